"""What a run writes down: its directory, metrics.jsonl and TensorBoard events."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from experiments.errors import UserError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"


def check_is_free(directory: Path) -> None:
    """Checks that a fresh run may write to a directory, without making it.

    Raises:
        UserError: If it is a file, or holds another run.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file; give a directory")
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CHECKPOINTS):
        if (directory / name).exists():
            raise UserError(
                f"--out {directory} holds another run ({name}); continue it with "
                "--resume or give another --out"
            )


def make_directory(directory: Path) -> None:
    """Makes the directory of a run.

    Raises:
        UserError: If that is not allowed or possible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --out {directory} ({error.strerror}); give another one"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole or not there; numbers that are not finite as null."""
    _write_whole(path, json.dumps(_finite(value), indent=2) + "\n")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last one that was cut off."""
    return read_lines(directory / METRICS_FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file's lines, none where it is absent.

    A last line that was cut off is left out.
    """
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


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
            _write_whole(path, "".join(map(_line, kept)))
        # One write per line: a killed process leaves whole lines behind.
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1 if step else None
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
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
    return json.dumps(_finite(record)) + "\n"


def _finite(value):
    """Returns the value with None for each number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_whole(path, text):
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)
