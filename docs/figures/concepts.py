"""The figures of the concepts, drawn from ``states.json``."""

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from docs.figures.style import BLUE, CYCLE, FAINT, GREEN, GREY, ORANGE, STATES, new


def _measured(name: str) -> Any:
    return json.loads(STATES.read_text(encoding="utf-8"))[name]


def _short(leaf: str) -> str:
    """Returns "mlp up" of "['blocks']['mlp']['up']"."""
    return leaf.replace("['blocks']", "").strip("[']").replace("']['", " ")


def subspace() -> Figure:
    """Energy captured by the best r directions, at three steps of training."""
    measured = _measured("subspace")
    figure, axes = new()
    for step, shares in measured["captured"].items():
        axes.plot(np.arange(1, len(shares) + 1), shares, label=f"step {step}")
    axes.axvline(32, color=FAINT, linestyle=":")
    axes.annotate("r = 32", (33, 0.12), color=GREY)
    axes.set(
        xlabel="rank r (columns of the basis, of 128)",
        ylabel="squared norm captured",
        ylim=(0, 1.02),
        xlim=(0, 64),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid()
    axes.legend(loc="lower right")
    return figure


def rank() -> Figure:
    """Directions that a gradient needs, against steps."""
    measured = _measured("rank")
    kept = 1 - measured["threshold"]
    figure, axes = new()
    chosen = ("query", "value", "output", "down")
    for leaf, needed in measured["needed"].items():
        name = _short(leaf)
        if not name.endswith(chosen):
            continue
        smooth = np.convolve(needed, np.ones(9) / 9, mode="valid")
        axes.plot(np.arange(4, 4 + len(smooth)), smooth, label=name)
    axes.set(
        xlabel="training step",
        ylabel=f"directions that keep {kept:.0%}",
        ylim=(0, None),
        xlim=(0, None),
    )
    axes.grid()
    axes.legend(loc="upper left")
    return figure


def refresh() -> Figure:
    """Energy captured by the basis in use, beside the best one of each step."""
    measured = _measured("refresh")
    figure, axes = new()
    axes.plot(measured["best"], color=GREY, linewidth=1.2, label="best basis of a step")
    axes.plot(measured["in_use"], color=BLUE, label="basis in use")
    for step in range(0, len(measured["in_use"]), measured["interval"]):
        label = "renewed" if step == 0 else None
        axes.axvline(step, color=ORANGE, linestyle=":", linewidth=1.4, label=label)
    axes.set(
        xlabel="training step",
        ylabel="squared norm captured",
        ylim=(0, 1.02),
        xlim=(-2, len(measured["in_use"])),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid()
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.0))
    return figure


def rebasing() -> Figure:
    """How much too large updates become, by re-basing rule and new direction."""
    measured = _measured("rebasing")
    order = ("square", "filled", "abs", "ldadam", "keep", "zero", "clamp")
    figure, axes = new(height=3.2)
    most = 300.0
    for row, rule in enumerate(order):
        factors = np.minimum(measured["factor"][rule], most)
        color = GREEN if rule == "square" else BLUE
        spread = row + 0.16 * np.sin(np.arange(len(factors)) * 2.4)
        axes.plot(factors, spread, "o", color=color, markersize=4, alpha=0.75)
    axes.axvline(1, color=GREY, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    ticks = (0.3, 1, 3, 10, 30, 100, most)
    axes.set_xticks(ticks, ["0.3", "1", "3", "10", "30", "100", "300 +"])
    axes.minorticks_off()
    axes.set(xlabel="update, as a multiple of what it should be", ylabel="rule")
    axes.grid(axis="x")
    return figure


def residual() -> Figure:
    """Share of each gradient that the subspace does not hold."""
    measured = _measured("residual")
    leaves = list(measured["outside"])
    names = [_short(leaf) for leaf in leaves]
    outside = [measured["outside"][leaf] for leaf in leaves]
    least = [measured["least"][leaf] for leaf in leaves]
    figure, axes = new()
    axes.barh(names, outside, color=BLUE, height=0.6, label="basis in use")
    axes.plot(least, names, "|", color=ORANGE, markersize=14, markeredgewidth=2.5)
    axes.plot([], [], "|", color=ORANGE, markeredgewidth=2.5, label="best basis")
    axes.invert_yaxis()
    axes.set(xlabel="squared norm outside the subspace")
    axes.set_xticks((0, 0.05, 0.1, 0.15, 0.2))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
    axes.legend(loc="lower right")
    return figure


def capacity() -> Figure:
    """Rank in use of four layers, and the columns that their arrays have."""
    measured = _measured("capacity")
    figure, axes = new()
    axes.step(
        range(len(measured["capacities"])),
        measured["capacities"],
        color=GREY,
        linewidth=2.4,
        where="post",
        label="capacity",
    )
    for layer, ranks in enumerate(np.transpose(measured["ranks"])):
        color = CYCLE[layer]
        axes.step(range(len(ranks)), ranks, where="post", color=color, linewidth=1.4)
        axes.plot([], [], color=color, label=f"rank, layer {layer}")
    axes.set(xlabel="training step", ylabel="columns", ylim=(0, 52), xlim=(0, None))
    axes.grid()
    figure.legend(loc="outside upper center", ncols=3)
    return figure


FIGURES = {
    "subspace": subspace,
    "rank": rank,
    "refresh": refresh,
    "rebasing": rebasing,
    "residual": residual,
    "capacity": capacity,
}
