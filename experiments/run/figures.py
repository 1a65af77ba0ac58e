"""The figures of a run: loss, rank per layer over steps, memory by kind."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLUMNS = 4


def draw_figures(
    directory: Path, records: list[dict[str, Any]], summary: dict[str, Any]
) -> list[Path]:
    """Writes loss.png, memory.png and, where there are ranks, ranks.png.

    Args:
        directory: Where to; made if missing.
        records: The lines of metrics.jsonl, at least one.
        summary: From :func:`experiments.run.summary.summarize`.

    Returns:
        The files.
    """
    directory.mkdir(exist_ok=True)
    figures = {
        "loss.png": _loss(records, summary),
        "memory.png": _memory(summary),
    }
    if any("ranks" in record for record in records):
        figures["ranks.png"] = _ranks([r for r in records if "ranks" in r])
    for name, figure in figures.items():
        # Not pyplot, which would keep every figure and choose a display.
        FigureCanvasAgg(figure).print_png(directory / name)
    return [directory / name for name in figures]


def _loss(records, summary):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    # null stands for a loss that was not finite.
    losses = np.array([record["loss"] for record in records], float)
    axes.plot(steps, losses, linewidth=1, label="training, one batch")
    validated = [r for r in records if "validation_loss" in r]
    axes.plot(
        [0, *(r["step"] for r in validated)],
        np.array(
            [
                summary["initial_validation_loss"],
                *(r["validation_loss"] for r in validated),
            ],
            float,
        ),
        marker="o",
        label="validation",
    )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title=f"{summary['model']}, {summary['optimizer']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _ranks(records):
    names = sorted(records[0]["ranks"])
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 2.6 * rows), layout="constrained")
    grid = figure.subplots(
        rows, _COLUMNS, sharex=True, sharey=True, squeeze=False
    ).ravel()
    steps = [record["step"] for record in records]
    for name, axes in zip(names, grid, strict=False):
        # (records, layers); a matrix that is not stacked is one layer.
        by_layer = np.array([np.ravel(record["ranks"][name]) for record in records])
        for layer, ranks in enumerate(by_layer.T):
            axes.step(steps, ranks, where="post", label=f"layer {layer}")
        axes.set(title=name.removeprefix("blocks/"))
        axes.grid(alpha=0.3)
    grid[0].set_ylim(bottom=0)
    for axes in grid[len(names) :]:
        axes.axis("off")
    figure.supxlabel("step")
    figure.supylabel("rank in use")
    handles, labels = grid[0].get_legend_handles_labels()
    # Beyond a dozen layers the colours repeat, and a legend says nothing.
    if len(labels) <= 12:
        figure.legend(handles, labels, loc="outside right center")
    return figure


def _memory(summary):
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = {"adamw": summary["adamw_memory"], summary["optimizer"]: summary["memory"]}
    left = np.zeros(len(bars))
    for kind in summary["memory"]:
        widths = np.array([bar[kind] for bar in bars.values()]) / 1e6
        axes.barh(list(bars), widths, left=left, label=kind)
        left += widths
    axes.set(xlabel="megabytes per device", title=f"memory by kind, {summary['model']}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
