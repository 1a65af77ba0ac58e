"""The report of a comparison: a table in Markdown, and figures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.comparison.rows import Row, front, rows_of
from experiments.comparison.suites import Suite

_MARKERS = "os^vD<>pPX*"


def table(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""
    adamw = next((row.mean for row in rows if row.method == "adamw"), None)
    lines = [
        "| method | rates: rest, blocks | loss, mean of seeds | seeds | spread "
        "| to AdamW | block state | whole state | tokens/s | runs | diverged |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = [run["tokens_per_second"] for run in row.runs]
        speeds = [speed for speed in speeds if speed is not None]
        diverged = "; ".join(
            f"{rest:g}, {blocks:g} after step {step}"
            for rest, blocks, step in row.diverged
        )
        cells = [
            row.method,
            f"{row.learning_rate:g}, {row.block_learning_rate:g}",
            _number(row.mean),
            str(len(row.losses)),
            _number(row.spread),
            _change(row.mean, adamw),
            f"{row.block_share:.3f}",
            f"{row.share:.3f}",
            f"{statistics.median(speeds):,.0f}" if speeds else "",
            str(row.tried),
            diverged,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    first = min(records, key=lambda record: record["status"] != "finished")
    commits = sorted({record["commit"] for record in records})
    heading = (
        f"Suite {name}, {suite.description}: {first['model']}, {first['steps']} steps; "
        f"{first['data']}; {first['device']}; of commit {', '.join(commits)}. Loss: "
        "nats per token of one validation set, the same for all. Spread: largest less "
        "smallest. State: bytes as a share of AdamW's. Runs: all that the method was "
        "given.\n\n"
    )
    (directory / "table.md").write_text(heading + table(rows))
    finished = [row for row in rows if np.isfinite(row.mean)]
    figures = {
        "loss-tokens": _curves(finished, 0, "tokens"),
        "loss-time": _curves(finished, 1, "seconds of training"),
        "loss-bytes": _bytes(finished),
        "ranks": _ranks(finished),
    }
    for figure_name, figure in figures.items():
        FigureCanvasSVG(figure).print_svg(directory / f"{figure_name}.svg")


def _curves(rows: Sequence[Row], place: int, label: str) -> Figure:
    """Draws the loss of each row's first seed against a coordinate of the curve."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(rows):
        curve = row.runs[0]["validation_curve"]
        axes.plot(
            [point[place] for point in curve],
            [point[2] for point in curve],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1,
            label=row.method,
        )
    axes.set(xlabel=label, ylabel="validation loss, nats per token")
    axes.legend(fontsize=7, ncols=2)
    return figure


def _bytes(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    ahead = front(rows, lambda row: (row.share, row.mean))
    for row in rows:
        axes.plot([row.share] * len(row.losses), row.losses, ".", color="0.7")
        axes.plot(row.share, row.mean, "o", color="C1" if row in ahead else "C0")
        axes.annotate(
            row.method,
            (row.share, row.mean),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axes.step(
        [row.share for row in ahead],
        [row.mean for row in ahead],
        where="post",
        color="C1",
        label="Pareto front",
    )
    axes.set(
        xscale="log",
        xlabel="optimizer state, share of AdamW's bytes",
        ylabel="validation loss, nats per token",
    )
    axes.legend()
    return figure


def _ranks(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        curve = row.runs[0]["rank_curve"]
        if curve:
            axes.plot(*zip(*curve, strict=True), label=row.method, linewidth=1)
    axes.set(xlabel="step", ylabel="rank in use, mean over the block matrices")
    if axes.lines:
        axes.legend(fontsize=7)
    return figure
