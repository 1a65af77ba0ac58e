"""The directory of a run: what its files are called, and how they are written."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


def checkpoint_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run, oldest first."""
    path = directory / CHECKPOINTS
    children = path.iterdir() if path.is_dir() else ()
    return sorted(int(child.name) for child in children if child.name.isdigit())


def check_is_free(directory: Path, *, resume: bool = False) -> None:
    """Checks that a run may start in a directory, without making it.

    Args:
        directory: Of the run, which has no checkpoint to continue from.
        resume: Whether what an unfinished run has left there may be overwritten.

    Raises:
        UserError: If it is a file, or holds the results of another run.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file; give a directory")
    has_summary = (directory / SUMMARY_FILE).exists()
    if resume:
        if has_summary:
            raise UserError(
                f"--out {directory} holds a finished run without checkpoints to resume "
                "from; give another --out"
            )
        return
    metrics = directory / METRICS_FILE
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    if has_summary or has_metrics or checkpoint_steps(directory):
        raise UserError(
            f"--out {directory} holds another run; continue it with --resume or give "
            "another --out"
        )


def remove_leftovers(directory: Path) -> None:
    """Removes the curves of a run that was killed before its first checkpoint."""
    (directory / METRICS_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory / TENSORBOARD, ignore_errors=True)


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
    write_whole(path, json.dumps(finite(value), indent=2) + "\n")


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


def finite(value: Any) -> Any:
    """Returns the value with None for each number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    unfinished(path).write_text(text)
    os.replace(unfinished(path), path)


def unfinished(path: Path) -> Path:
    """Returns the file that is written before :func:`write_whole` gives it its name."""
    return path.with_name(path.name + ".unfinished")
