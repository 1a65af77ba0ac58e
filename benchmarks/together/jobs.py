"""Jobs of the worker processes: the search of a method on a suite."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import turns
from benchmarks.together.search import is_inside, next_points
from benchmarks.together.texts import load
from experiments.comparison.ledger import matching
from experiments.comparison.measures import LOSS
from experiments.comparison.search import best_point, rates_at
from experiments.comparison.suite import Contender, Suite
from experiments.comparison.suites import SUITES
from experiments.run.files import read_lines

# Points of a search at most: one that runs away has a fault.
_MOST_POINTS = 30


class Job(NamedTuple):
    """The search of one method."""

    suite: str
    method: str


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Returns the jobs, by the order of --only, then of suites.

    Raises:
        ValueError: If --only has a method that no suite has.
    """
    found = [
        Job(name, c.name)
        for name in options.suites
        for c in _suite(name, options).contenders
    ]
    if options.only:
        names = {job.method for job in found}
        if unknown := sorted(set(options.only) - names):
            raise ValueError(
                f"--only {unknown[0]!r} is no method of {', '.join(options.suites)}; "
                f"give some of {', '.join(sorted(names))}."
            )
        found = [job for job in found if job.method in options.only]
        found.sort(key=lambda job: options.only.index(job.method))
    return found


def _suite(name: str, options: argparse.Namespace) -> Suite:
    suite = SUITES[name].changed(steps=options.steps)
    if options.candidates:
        more = [Contender(**x) for x in json.loads(options.candidates.read_text())]
        suite = dataclasses.replace(suite, contenders=(*suite.contenders, *more))
    return suite


def searched(options: argparse.Namespace, job: Job) -> str:
    """Does a job in a worker; returns what came of it, in a line."""
    # Imported here: the workers alone need JAX.
    from benchmarks.together.runs import Late, Run, Together

    suite = _suite(job.suite, options)
    contender = next(c for c in suite.contenders if c.name == job.method)
    texts = load(options.texts[options.suites.index(job.suite)])
    method = Together(
        suite, contender, texts, options.width, options.deadline, turns.turn()
    )
    known = [x for path in options.known for x in read_lines(path)]

    def train(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
        """Returns the records of runs; only those that are not known are trained."""
        keys = [{"suite": job.suite, **method.key(run)} for run in runs]
        missing = [i for i, key in enumerate(keys) if matching(known, key) is None]
        while missing:
            now, missing = missing[: options.width], missing[options.width :]
            found = method.train([runs[i] for i in now])
            with options.out.open("a") as file:
                for i, more in zip(now, found, strict=True):
                    record = {**keys[i], **more, "commit": options.commit}
                    known.append(record)
                    file.write(json.dumps(record) + "\n")
        return [matching(known, key) for key in keys]  # type: ignore[return-value]

    losses: dict[Any, float] = {}
    said = "nothing"
    try:
        while len(losses) < _MOST_POINTS:
            points = next_points(losses, options.width)
            if not points:
                break
            runs = [Run(rates_at(contender, point), 0) for point in points]
            for point, record in zip(points, train(runs), strict=True):
                losses[point] = LOSS.cost(record)
            best = best_point(losses)
            where = "inside" if is_inside(losses) else "at the edge"
            rates = rates_at(contender, best)
            said = (
                f"{losses[best]:.4f} at {rates[0]:g}, {rates[1]:g}, {where} of "
                f"{len(losses)} points"
            )
        rates = rates_at(contender, best_point(losses))
        others = train([Run(rates, i) for i in range(1, len(texts.streams))])
        said += "; others " + " ".join(f"{x['validation_loss']:.4f}" for x in others)
    except Late:
        said += "; then the time was over"
    return said
