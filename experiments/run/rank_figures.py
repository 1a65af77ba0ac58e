"""The figures of ranks while a model is tuned: by layer, their bytes, first spectra.

As AdaRankGrad's Figures 3, 4 and 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.run.figures import write_figures
from experiments.run.spectra import Spectra, captured, needed_ranks

_COLUMNS = 4


def draw_rank_figures(
    directory: Path,
    records: list[dict[str, Any]],
    summary: Mapping[str, Any],
    spectra: Spectra | None = None,
    threshold: float | None = None,
) -> list[Path]:
    """Writes rank_by_layer.png, state_bytes.png and first_spectra.png.

    The first two are drawn where ranks, or bytes, are not all equal.

    Args:
        directory: Where to; made if missing.
        records: The lines of metrics.jsonl.
        summary: Of the run.
        spectra: From :func:`experiments.run.spectra.first_spectra`; None: no figure.
        threshold: Of the run's --threshold, which the spectra are marked at; None: no
            mark.

    Returns:
        The files.
    """
    ranked = [record for record in records if record.get("ranks")]
    sized = [record for record in records if "optimizer_state_bytes" in record]
    figures = {}
    if _differ(np.ravel(r) for line in ranked for r in line["ranks"].values()):
        figures["rank_by_layer.png"] = rank_by_layer(ranked)
    if _differ([[record["optimizer_state_bytes"]] for record in sized]):
        figures["state_bytes.png"] = state_bytes(sized, summary)
    if spectra:
        figures["first_spectra.png"] = first_spectra_figure(spectra, threshold)
    return write_figures(directory, figures)


def _differ(groups: Any) -> bool:
    return len({value for group in groups for value in np.ravel(group).tolist()}) > 1


def rank_by_layer(records: list[dict[str, Any]]) -> Figure:
    """Draws ranks over steps: a panel for each kind of matrix, a line for each layer.

    Args:
        records: Lines of metrics.jsonl with ranks.
    """
    names = list(records[0]["ranks"])
    steps = [record["step"] for record in records]
    # (records, layers); a matrix that is not stacked is one layer.
    ranks = {
        name: np.array([np.ravel(record["ranks"][name]) for record in records])
        for name in names
    }
    figure, grid, colours = _panels(ranks)
    for axes, (name, lines) in zip(grid, ranks.items(), strict=False):
        for layer, line in enumerate(lines.T):
            # Lines lie on each other: the upper ones are thinner.
            width = 3.2 - 2.2 * layer / max(1, lines.shape[1] - 1)
            axes.step(steps, line, where="post", color=colours[layer], linewidth=width)
        axes.set(title=_short(name), ylim=(0, 1.08 * max(map(np.max, ranks.values()))))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.suptitle("rank in use, by layer")
    figure.supxlabel("step")
    figure.supylabel("columns")
    return figure


def state_bytes(records: list[dict[str, Any]], summary: Mapping[str, Any]) -> Figure:
    """Draws the bytes of the block matrices' state and their mean rank over steps.

    Bytes fall where columns are freed, not where ranks fall: these steps are dashed.

    Args:
        records: Lines of metrics.jsonl with bytes, and with ranks if there are any.
        summary: Of the run, with ``optimizer_state_bytes``, ``block_state_bytes`` and
            ``compactions``.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = np.array([record["step"] for record in records])
    # What is not of the block matrices stays as large as it is at the end.
    others = summary["optimizer_state_bytes"] - summary["block_state_bytes"]
    sizes = np.array([record["optimizer_state_bytes"] for record in records]) - others
    unit, size = ("MB", 1e6) if sizes.max() >= 1e6 else ("kB", 1e3)
    (line,) = axes.step(steps, sizes / size, where="post", label="state")
    for entry in summary["compactions"]:
        axes.axvline(entry["step"], color="0.6", linestyle="--", linewidth=1)
    axes.set(
        xlabel="step",
        ylabel=f"{unit} of the block matrices' state",
        ylim=(0, 1.08 * sizes.max() / size),
        title=f"{summary['model']}, {summary['optimizer']}",
    )
    if all(record.get("ranks") for record in records):
        means = [
            np.concatenate([np.ravel(r) for r in record["ranks"].values()]).mean()
            for record in records
        ]
        beside = axes.twinx()
        (rank,) = beside.step(
            steps, means, where="post", color="tab:green", label="mean rank"
        )
        beside.set(ylabel="columns", ylim=(0, 1.08 * max(means)))
        axes.legend(handles=[line, rank], loc="lower left")
    return figure


def first_spectra_figure(spectra: Spectra, threshold: float | None) -> Figure:
    """Draws what share of a gradient its first k directions hold, by k and layer.

    A dot is the rank that the threshold asks for.

    Args:
        spectra: From :func:`experiments.run.spectra.first_spectra`, at least one.
        threshold: Share that may be lost; None: no dots.
    """
    figure, grid, colours = _panels({k: v.T for k, v in spectra.items()})
    for axes, (name, spectrum) in zip(grid, spectra.items(), strict=False):
        shares = captured(spectrum)
        for layer, share in enumerate(shares):
            axes.plot(np.arange(1, len(share) + 1), share, color=colours[layer], lw=1)
        if threshold is not None:
            axes.axhline(1 - threshold, color="0.6", linestyle="--", linewidth=1)
            for layer, rank in enumerate(needed_ranks(spectrum, threshold)):
                axes.plot(rank, shares[layer, rank - 1], "o", color=colours[layer])
        axes.set(title=_short(name), xscale="log", ylim=(0, 1.03))
    figure.suptitle("the first gradient: share of its squared norm, by layer")
    figure.supxlabel("directions")
    return figure


def _panels(by_name: Mapping[str, np.ndarray]):
    """Returns a figure, an axes for each name, and the colour of each layer.

    Args:
        by_name: Arrays whose last axis is the layers.
    """
    rows = -(-len(by_name) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 1.0 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).ravel()
    for axes in grid[len(by_name) :]:
        axes.axis("off")
    layers = max(array.shape[-1] for array in by_name.values())
    map_ = matplotlib.colormaps["viridis"]
    norm = BoundaryNorm(np.arange(layers + 1) - 0.5, map_.N)
    mappable = ScalarMappable(norm, map_)
    figure.colorbar(
        mappable, ax=grid, label="layer", ticks=MaxNLocator(integer=True), aspect=30
    )
    return figure, grid, mappable.to_rgba(np.arange(layers))


def _short(name: str) -> str:
    return name.removeprefix("blocks/").removesuffix("/kernel")
