"""The numbers of a run while it trains: metrics.jsonl and TensorBoard events."""

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


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last one that was cut off."""
    return read_lines(directory / METRICS_FILE)


class MetricsLog:
    """Appends to metrics.jsonl and to the TensorBoard events of a run.

    Args:
        directory: Of the run.
        step: Step to continue behind: later lines, of a process that was killed after
            its last checkpoint, are cut off. 0: a fresh run.
    """

    def __init__(self, directory: Path, step: int = 0):
        path = directory / METRICS_FILE
        if path.exists():
            kept = [r for r in read_metrics(directory) if r["step"] <= step]
            write_whole(path, "".join(map(_line, kept)))
        # One write per line: a killed process leaves whole lines behind.
        self._file = path.open("a", buffering=1)
        self._events = Events(directory / TENSORBOARD, step + 1 if step else None)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # What ended the run, a full disk perhaps, is told first.
        with contextlib.suppress(*([] if error is None else [OSError])):
            try:
                self._file.close()
            finally:
                self._events.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one line, and each of its numbers (and mean rank) as an event."""
        self._file.write(_line(record))
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, record["step"])
        for name, ranks in record.get("ranks", {}).items():
            mean = sum(ranks) / len(ranks) if isinstance(ranks, list) else ranks
            self._events.add_scalar(f"rank/{name}", mean, record["step"])


def _line(record):
    return json.dumps(finite(record)) + "\n"
