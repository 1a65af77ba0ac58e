"""What a finished fine-tuning run says of itself: summary.json and a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from experiments.run.parts import Parts
from experiments.run.summary import cost_rows, costs, identity, print_rows
from experiments.run.train import Trained
from experiments.tuning.answer_work import AnswerWork
from experiments.tuning.encoder_work import EncoderWork
from experiments.tuning.numbers import in_words


def summarize(
    parts: Parts[EncoderWork] | Parts[AnswerWork],
    trained: Trained,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns what summary.json holds; see :mod:`experiments.tuning.quantities`.

    Args:
        parts: Of the run.
        trained: Its end.
        records: The lines of metrics.jsonl.
    """
    progress = trained.progress
    last = progress.validation
    best = progress.best or {}
    return {
        "task": parts.config.task,
        **identity(parts, trained),
        "metric": next(iter(last["validation_metrics"])),
        "initial_metric": progress.initial["validation_metric"],
        "last_metric": last["validation_metric"],
        "best_metric": best.get("validation_metric"),
        "best_step": best.get("step"),
        "last_metrics": last["validation_metrics"],
        "validation_loss": last["validation_loss"],
        "bucket_lengths": list(parts.work.data.bucket_lengths),
        **costs(parts, trained, records),
    }


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints the short table of a run."""
    metric = summary["metric"].replace("_", " ")
    rows = {
        "task": summary["task"],
        "optimizer": summary["optimizer"],
        "model": f"{summary['model']}, {summary['parameter_count']:,} parameters",
        "steps": f"{summary['steps']:,}, {summary['epoch']:.2f} epochs",
        "at first": f"{metric} {summary['initial_metric']:.4f}",
        "at last": in_words(summary["last_metrics"]),
    }
    if summary["best_metric"] is not None:
        rows["at best"] = (
            f"{metric} {summary['best_metric']:.4f} at step {summary['best_step']:,}"
        )
    print_rows(console, {**rows, **cost_rows(summary)})
