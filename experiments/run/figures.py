"""The figures of a run: loss, rank per layer over steps, memory by kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLUMNS = 4


def draw_figures(
    directory: Path, records: list[dict[str, Any]], summary: dict[str, Any]
) -> list[Path]:
    """Writes loss.png, memory.png and, where ranks differ, ranks.png.

    Args:
        directory: Where to; made if missing.
        records: The lines of metrics.jsonl, at least one.
        summary: From :func:`experiments.run.summary.summarize`.

    Returns:
        The files.
    """
    figures = {
        "loss.png": _loss(records, summary),
        "memory.png": _memory(summary),
    }
    ranked = [record for record in records if "ranks" in record]
    used = {
        r for line in ranked for ranks in line["ranks"].values() for r in _flat(ranks)
    }
    if len(used) > 1:
        figures["ranks.png"] = _ranks(ranked, min(used), max(used))
    return write_figures(directory, figures)


def write_figures(directory: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Writes figures under their names; returns the files. Makes the directory."""
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        # Not pyplot, which would keep every figure and choose a display.
        FigureCanvasAgg(figure).print_png(directory / name)
    return [directory / name for name in figures]


def _loss(records, summary):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_curve(records, "loss"), linewidth=1, label="training, one batch")
    axes.plot(*_curve(records, "validation_loss"), marker="o", label="validation")
    axes.set(
        xlabel="step",
        ylabel="loss (nats)",
        title=f"{summary['model']}, {summary['optimizer']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _curve(records, name):
    """Returns the steps that have a quantity, and its values."""
    found = [(record["step"], record[name]) for record in records if name in record]
    # null stands for a loss that was not finite.
    return np.array(found, float).T


def _flat(ranks):
    """Returns the ranks of one matrix, which may be a stack of layers, as a list."""
    return np.ravel(ranks).tolist()


def _ranks(records, least, most):
    names = sorted(records[0]["ranks"])
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 0.8 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    # A line's ranks hold since the line before.
    edges = [0, *(record["step"] for record in records)]
    # (layers, records); a matrix that is not stacked is one layer.
    ranks = {
        name: np.array([_flat(record["ranks"][name]) for record in records]).T
        for name in names
    }
    for name, axes in zip(names, grid, strict=False):
        image = axes.pcolormesh(
            edges,
            np.arange(len(ranks[name]) + 1) - 0.5,
            ranks[name],
            vmin=least,
            vmax=most,
        )
        low, high = ranks[name].min(), ranks[name].max()
        span = f"{low}" if low == high else f"{low} to {high}"
        axes.set_title(f"{name.removeprefix('blocks/')}: {span}", fontsize="medium")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.invert_yaxis()
    for axes in grid[len(names) :]:
        axes.axis("off")
    figure.suptitle("rank in use")
    figure.supxlabel("step")
    figure.supylabel("layer")
    figure.colorbar(
        image, ax=grid, label="rank", ticks=MaxNLocator(integer=True), aspect=30
    )
    return figure


def _memory(summary):
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = {"adamw": summary["adamw_memory"], summary["optimizer"]: summary["memory"]}
    totals = [sum(bar.values()) for bar in bars.values()]
    unit, size = ("GB", 1e9) if max(totals) >= 1e9 else ("MB", 1e6)
    left = np.zeros(len(bars))
    for kind in summary["memory"]:
        widths = np.array([bar[kind] for bar in bars.values()]) / size
        if widths.any():
            drawn = axes.barh(list(bars), widths, left=left, label=kind)
            left += widths
    axes.bar_label(drawn, [f"{total / size:.2f}" for total in totals], padding=4)
    axes.margins(x=0.12)
    axes.set(
        xlabel=f"{unit} on all devices together",
        title=f"{summary['model']}: parameters, gradients and state",
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure
