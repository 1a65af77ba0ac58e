"""Jobs of the worker processes: the searches and seeds of a method on a task."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import turns
from experiments.comparison.ledger import matching
from experiments.comparison.search import searched_rates
from experiments.comparison.suite import Suite
from experiments.comparison.suites import SUITES
from experiments.run.files import read_lines


class Job(NamedTuple):
    """The runs of one method on one task."""

    suite: str
    part: str
    method: str


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Returns the jobs, by the order of --only, then of suites and tasks."""
    found = []
    for name in options.suites:
        suite = SUITES[name]
        for part in [x.name for x in suite.tasks] or [""]:
            if part and options.parts and part not in options.parts:
                continue
            found += [Job(name, part, c.name) for c in suite.contenders]
    if options.only:
        found = [job for job in found if job.method in options.only]
        found.sort(key=lambda job: options.only.index(job.method))
    return found


def trained(options: argparse.Namespace, job: Job) -> str:
    """Does a job in a worker; returns what came of it, in a line."""
    records = _runs(options, job)
    measure = SUITES[job.suite].measure.entry
    return " ".join(
        f"{r[measure]:.4f}" if measure in r else r["status"] for r in records
    )


def _runs(options: argparse.Namespace, job: Job) -> Sequence[Mapping[str, Any]]:
    # Imported here: the workers alone need JAX.
    from benchmarks.tuning.runs import Late, Method

    suite = _suite(options, job)
    contender = next(c for c in suite.contenders if c.name == job.method)
    data = options.data[options.suites.index(job.suite)]
    method = Method(
        suite,
        contender,
        suite.trainer.data(suite.flags, data, None, ""),
        options.deadline,
        turns.turn(),
    )
    known = [x for path in options.known or () for x in read_lines(path)]
    records: list[Mapping[str, Any]] = []

    def run(rates, seed):
        key = {**job._asdict(), **method.key(rates, seed)}
        record = matching(known, key)
        if record is None:
            record = {**key, **method.run(rates, seed), "commit": options.commit}
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        records.append(record)
        return record

    first, *others = suite.seeds[: options.seeds]
    try:
        if options.rates:
            rates = tuple(options.rates)
            run(rates, first)
        else:
            rates = searched_rates(contender, suite, lambda rates: run(rates, first))
        for seed in others:
            run(rates, seed)
    except Late:
        pass
    return records


def _suite(options: argparse.Namespace, job: Job) -> Suite:
    suite = SUITES[job.suite].changed(steps=options.steps, model=options.model)
    if options.search is not None:
        suite = dataclasses.replace(suite, search=options.search)
    for task in suite.tasks:
        if task.name == job.part:
            return suite.of_task(task)
    return suite
