"""Jobs of the worker processes: the search of a method on a suite."""

import argparse
import contextlib
import dataclasses
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


# The accelerator is one worker's at a time; set in each worker.
_turn: Any = contextlib.nullcontext()


def start_worker(turn: Any) -> None:
    """Keeps the lock of the accelerator in a new worker."""
    global _turn
    _turn = turn


def jobs_of(options: argparse.Namespace) -> list[Job]:
    found = [
        Job(name, c.name)
        for name in options.suites
        for c in _suite(name, options).contenders
    ]
    if options.only:
        found = [job for job in found if job.method in options.only]
        found.sort(key=lambda job: options.only.index(job.method))
    return found


def _suite(name: str, options: argparse.Namespace) -> Suite:
    suite = SUITES[name].changed(steps=options.steps)
    if options.candidates:
        more = [Contender(**x) for x in json.loads(options.candidates.read_text())]
        suite = dataclasses.replace(suite, contenders=(*suite.contenders, *more))
    return suite


def done(work: tuple[argparse.Namespace, Job]) -> str:
    """Does a job in a worker; returns what came of it, in a line."""
    options, job = work
    started = time.monotonic()
    if started > options.deadline:
        return f"{' '.join(job)}: no time was left"
    try:
        said = _searched(options, job)
    except Exception as error:
        text = traceback.format_exc(limit=-3)
        return f"{' '.join(job)}: {type(error).__name__}: {str(error)[:300]}\n{text}"
    return f"{' '.join(job)}: {said}, {time.monotonic() - started:.0f} s"


def _searched(options: argparse.Namespace, job: Job) -> str:
    # Imported here: the workers alone need JAX.
    from benchmarks.together.runs import Late, Run, Together

    suite = _suite(job.suite, options)
    contender = next(c for c in suite.contenders if c.name == job.method)
    texts = load(options.texts[options.suites.index(job.suite)])
    method = Together(suite, contender, texts, options.width, options.deadline, _turn)
    known = [x for path in options.known for x in read_lines(path)]

    def train(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
        """Returns the records of runs; only those that are not known are trained."""
        keys = [{"suite": job.suite, **method.key(run)} for run in runs]
        missing = [i for i, key in enumerate(keys) if matching(known, key) is None]
        if missing:
            found = method.train([runs[i] for i in missing])
            with options.out.open("a") as file:
                for i, more in zip(missing, found, strict=True):
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
