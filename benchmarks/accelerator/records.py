"""One JSON file per stage, written anew with every measurement."""

import datetime
import json
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

FILES = {"a": "a-update", "b": "b-step", "c": "c-refresh", "d": "d-24gb"}

Write = Callable[[dict[str, Any]], None]


def path_of(out: Path, stage: str) -> Path:
    """Returns the file of a stage."""
    return out / f"{FILES[stage]}.json"


def start(out: Path, stage: str, commit: str) -> None:
    """Writes a file without measurements, with versions, date and commit."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "device": "not seen yet",
        **{name: _version(name) for name in ("jax", "jaxlib", "optax", "flax")},
    }
    _save(out, stage, {"environment": environment, "measurements": {}})


def add_device(out: Path, stage: str, device: str) -> None:
    """Writes the device of the measurements."""
    record = load(out, stage)
    record["environment"]["device"] = device
    _save(out, stage, record)


def add(out: Path, stage: str, name: str, result: dict[str, Any]) -> None:
    """Writes a measurement, over the same entries of an earlier one."""
    record = load(out, stage)
    measurements = record["measurements"]
    measurements[name] = {**measurements.get(name, {}), **result}
    _save(out, stage, record)


def load(out: Path, stage: str) -> dict[str, Any]:
    """Returns the contents of a stage's file."""
    return json.loads(path_of(out, stage).read_text())


def has_ended(result: dict[str, Any]) -> bool:
    """Returns whether a measurement is complete."""
    return any(key in result for key in ("finished", "error", "skipped"))


def text_of(error: BaseException) -> str:
    """Returns the first lines of an error."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return "\n".join(line[:300] for line in lines[:5])


def _save(out: Path, stage: str, record: dict[str, Any]) -> None:
    path = path_of(out, stage)
    # If a process ends during a write, the old file stays.
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
