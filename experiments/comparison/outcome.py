"""How a run ended, as a comparison records it."""

import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run.files import CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE
from experiments.run.metrics import read_metrics

# Entries of summary.json.
_KEPT = (
    "initial_validation_loss",
    "model",
    "steps",
    "tokens",
    "tokens_per_second",
    "training_seconds",
    "optimizer_state_bytes",
    "adamw_state_bytes",
    "block_state_bytes",
    "block_adamw_state_bytes",
    "data",
    "device",
    "versions",
)


def outcome(directory: Path) -> dict[str, Any]:
    """Returns the outcome of a run, finished or diverged; deletes its checkpoints.

    Args:
        directory: Directory of a run that has ended.
    """
    config = json.loads((directory / CONFIG_FILE).read_text())
    path = directory / SUMMARY_FILE
    summary = json.loads(path.read_text()) if path.exists() else {}
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    loss, first = summary.get("validation_loss"), summary.get("initial_validation_loss")
    is_finished = loss is not None and math.isfinite(loss) and loss < first
    return {
        "status": "finished" if is_finished else "diverged",
        "step": config["steps"] if is_finished else _last_good_step(directory),
        "commit": _commit(),
        "directory": directory.name,
        "validation_loss": loss,
        **{name: summary.get(name) for name in _KEPT},
        **curves(read_metrics(directory)),
    }


def loss_of(record: Mapping[str, Any]) -> float:
    """Returns the validation loss of a recorded run, infinite if the run diverged."""
    return record["validation_loss"] if record["status"] == "finished" else math.inf


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the curves for figures, from the lines of a run's metrics.jsonl.

    Returns:
        validation_curve: (tokens, seconds of training, loss) of each validation;
        rank_curve: (step, mean rank in use of the projected matrices) of each line.
    """
    seconds, tokens = 0.0, 0
    validations, ranks = [], []
    # The validation before the first step is the same for all.
    for record in (record for record in records if record["step"]):
        seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
        tokens = record["tokens"]
        if "validation_loss" in record:
            loss = record["validation_loss"]
            validations.append((tokens, round(seconds, 2), loss))
        if record.get("ranks"):
            means = [statistics.mean(_flat(x)) for x in record["ranks"].values()]
            ranks.append((record["step"], round(statistics.mean(means), 2)))
    return {"validation_curve": validations, "rank_curve": ranks}


def _flat(ranks: Any) -> list[int]:
    return ranks if isinstance(ranks, list) else [ranks]


def _last_good_step(directory: Path) -> int:
    """Returns the last logged step with a finite loss."""
    records = read_metrics(directory)
    good = [r["step"] for r in records if r.get("loss") is not None]
    return max(good, default=0)


def _commit() -> str:
    """Returns the commit of the code, with a + if the code has changed since."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
