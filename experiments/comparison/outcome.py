"""How a run ended, as a comparison records it."""

import json
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.suite import Suite
from experiments.run.files import CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE
from experiments.run.metrics import read_metrics


def outcome(directory: Path, suite: Suite) -> dict[str, Any]:
    """Returns the outcome of a run, finished or diverged; deletes its checkpoints.

    Args:
        directory: Directory of a run that has ended.
        suite: Of the comparison.
    """
    config = json.loads((directory / CONFIG_FILE).read_text())
    path = directory / SUMMARY_FILE
    summary = json.loads(path.read_text()) if path.exists() else {}
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    is_finished = suite.trainer.has_learned(summary)
    return {
        "status": "finished" if is_finished else "diverged",
        "step": config["steps"] if is_finished else _last_good_step(directory),
        "commit": commit_of_code(),
        "directory": directory.name,
        "validation_loss": summary.get("validation_loss"),
        **{name: summary.get(name) for name in suite.trainer.kept},
        **curves(read_metrics(directory), suite.measure.line),
    }


def curves(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Returns the curves for figures, from the lines of a run's metrics.jsonl.

    Args:
        records: The lines.
        name: Of the number that is compared.

    Returns:
        validation_curve: (tokens, seconds of training, number) of each validation;
        rank_curve: (step, mean rank in use of the projected matrices) of each line.
    """
    seconds, tokens = 0.0, 0
    validations, ranks = [], []
    # The validation before the first step is the same for all.
    for record in (record for record in records if record["step"]):
        seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
        tokens = record["tokens"]
        if name in record:
            validations.append((tokens, round(seconds, 2), record[name]))
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


def commit_of_code() -> str:
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
