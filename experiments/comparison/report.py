"""The report of a comparison that pre-trains: a table in Markdown, and figures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.charts import draw
from experiments.comparison.markdown import markdown
from experiments.comparison.origin import origin
from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suite import Suite


def table(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""
    adamw = next((row.mean for row in rows if row.method == "adamw"), None)
    heads = [
        *("method", "rates: rest, blocks", "loss, mean of seeds", "seeds", "spread"),
        *("to AdamW", "block state", "whole state", "tokens/s", "runs", "diverged"),
    ]
    lines = []
    for row in rows:
        speeds = [run["tokens_per_second"] for run in row.runs]
        speeds = [speed for speed in speeds if speed is not None]
        cells = [
            row.method,
            row.rates,
            _number(row.mean),
            str(len(row.losses)),
            _number(row.spread),
            _change(row.mean, adamw),
            f"{row.block_share:.3f}",
            f"{row.share:.3f}",
            f"{statistics.median(speeds):,.0f}" if speeds else "",
            str(row.tried),
            row.divergences,
        ]
        lines.append(cells)
    return markdown(heads, lines)


def _change(loss: float, adamw: float | None) -> str:
    if adamw is None or not np.isfinite(loss) or not np.isfinite(adamw):
        return ""
    return f"{100 * (loss / adamw - 1):+.2f} %"


def _number(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "diverged"


def write_report(
    directory: Path, name: str, suite: Suite, records: Sequence[Mapping[str, Any]]
) -> None:
    """Writes table.md and figures of the finished runs.

    Args:
        directory: Directory of the comparison.
        name: Name of the suite.
        suite: The suite.
        records: Lines of results.jsonl.
    """
    rows = rows_of(records)
    heading = (
        f"Suite {name}, {suite.description}: {origin(records)}. Loss: nats per token "
        "of one validation set, the same for all. Spread: largest less smallest. "
        "State: bytes as a share of AdamW's. Runs: all that the method was given.\n\n"
    )
    (directory / "table.md").write_text(heading + table(rows))
    finished = [row for row in rows if np.isfinite(row.mean)]
    draw(directory, finished, suite.measure, suite.measure.label)
