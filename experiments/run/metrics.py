"""The numbers of a run while it trains: metrics.jsonl, TensorBoard and W&B."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.events import Events
from experiments.run.files import (
    METRICS_FILE,
    TENSORBOARD,
    finite,
    read_lines,
    write_whole,
)
from experiments.run.quantities import LINE
from experiments.run.wandb_run import WandbRun

_EVENTS = {quantity.name: quantity.event for quantity in LINE}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last one that was cut off."""
    return read_lines(directory / METRICS_FILE)


class MetricsLog:
    """Appends to metrics.jsonl and to the events of a run; a context manager.

    Args:
        directory: Of the run.
        step: Step to continue behind: later lines, of a process that was killed after
            its last checkpoint, are cut off. 0: a run that starts, all lines are.
        wandb: Takes the events too; None: TensorBoard alone has them.
    """

    def __init__(self, directory: Path, step: int = 0, wandb: WandbRun | None = None):
        path = directory / METRICS_FILE
        if path.exists():
            kept = [r for r in read_metrics(directory) if step and r["step"] <= step]
            write_whole(path, "".join(map(_line, kept)))
        # One write per line: a killed process leaves whole lines behind.
        self._file = path.open("a", buffering=1)
        self._events = Events(directory / TENSORBOARD, step + 1 if step else 0)
        self._wandb = wandb

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # What ended the run, a full disk perhaps, is told first.
        told = contextlib.suppress(*([] if error is None else [OSError]))
        with told, contextlib.ExitStack() as closing:
            if self._wandb is not None:
                closing.callback(self._wandb.finish, failed=error is not None)
            closing.callback(self._events.close)
            closing.callback(self._file.close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one line, and each of its numbers (and mean rank) as an event."""
        self._file.write(_line(record))
        found = events(record)
        for name, value in found.items():
            self._events.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(record["step"], found)


class NoLog:
    """In the place of :class:`MetricsLog`, where another process writes."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        """The other process writes."""


def events(record: Mapping[str, Any]) -> Mapping[str, float]:
    """Returns a line's numbers by their names in TensorBoard and W&B."""
    numbers = {
        _EVENTS.get(name, f"train/{name}"): value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step"
    }
    for name, value in record.get("validation_metrics", {}).items():
        numbers[f"eval/{name}"] = value
    for name, ranks in record.get("ranks", {}).items():
        mean = sum(ranks) / len(ranks) if isinstance(ranks, list) else ranks
        numbers[f"rank/{name}"] = mean
    return numbers


def _line(record):
    return json.dumps(finite(record)) + "\n"
