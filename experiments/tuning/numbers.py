"""The numbers of a validation in fine-tuning: loss, and metrics by split."""

from collections.abc import Mapping
from typing import Any


def numbers(loss: float, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns the entries of metrics.jsonl.

    Args:
        loss: Mean over the examples, or the answers' tokens, of the first split.
        metrics: By the name of the split; the first number of the first one is the
            primary metric.
    """
    several = len(metrics) > 1
    named = {
        f"{split}_{name}" if several else name: value
        for split, found in metrics.items()
        for name, value in found.items()
    }
    return {
        "validation_loss": loss,
        "validation_metric": next(iter(named.values())),
        "validation_metrics": named,
    }


def in_words(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of a validation in words."""
    return ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in metrics.items())
