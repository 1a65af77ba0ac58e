"""The figures of losses, drawn from ``benchmarks/results/cpu-small``."""

import json
from collections.abc import Iterable

from matplotlib.figure import Figure

from docs.figures.style import BLUE, DIRECTORY, FAINT, GREY, ORANGE, new
from experiments.comparison.rows import Row, front, rows_of

RESULTS = DIRECTORY.parents[1] / "benchmarks" / "results"


def rows() -> dict[str, Row]:
    """Returns the row of each method of cpu-small, by rising loss."""
    return rows_of_suite("cpu-small")


def rows_of_suite(suite: str) -> dict[str, Row]:
    """Returns the row of each method of one folder of ``benchmarks/results``."""
    lines = (RESULTS / suite / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row.method: row for row in rows_of(map(json.loads, lines))}


# Row of the comparison -> its name in figures, and where the name stands: horizontal
# alignment, and points to the right and up.
_BYTES = {
    "adamw": ("AdamW", "right", 0, 13),
    "adamw 8 bits": ("AdamW, 8 bits", "center", 4, 15),
    "adafactor": ("Adafactor", "left", -8, -17),
    "muon": ("Muon", "left", 7, 3),
    "optax_galore": ("optax.contrib.galore, d/4", "left", -8, 11),
    "low_rank_muon dct r=104 8 bits": (
        "low_rank_muon, cosines, 13d/16",
        "left",
        -8,
        -11,
    ),
    "low_rank_muon dct r=16 8 bits": (
        "low_rank_muon, cosines, d/8",
        "left",
        -10,
        16,
    ),
    "normuon": ("NorMuon", "left", 7, -2),
    "low_rank_muon r=64 8 bits": ("low_rank_muon, d/2, 8 bits", "left", 7, 1),
    "low_rank_muon 8 bits": ("low_rank_muon, d/4, 8 bits", "left", -10, 14),
    "sumo r=64 8 bits": ("sumo, d/2, 8 bits", "left", 6, 5),
    "sumo 8 bits": ("sumo, d/4, 8 bits", "left", 6, 0),
    "adarankgrad": ("adarankgrad, 3d/8", "left", 5, -10),
    "adarankgrad 8 bits": ("adarankgrad, 3d/8, 8 bits", "right", -6, -9),
    "frugal": ("FRUGAL, d/4", "right", -6, -15),
    "stable_spam": ("Stable-SPAM", "right", -6, 9),
    "scale": ("SCALE", "left", 7, 0),
    "galore": ("galore, d/4", "left", 5, -6),
    "galore 8 bits": ("galore, d/4, 8 bits", "left", -52, 17),
    "projfactor": ("projfactor", "right", -5, 5),
}
_THEIRS = {"adamw", "adamw 8 bits", "adafactor", "muon", "optax_galore"}
_THEIRS |= {"normuon", "frugal", "stable_spam", "scale"}


def loss_against_bytes() -> Figure:
    """Loss against the bytes of the whole optimizer state."""
    found = rows()
    figure, axes = new(height=4.6)
    chosen = [found[method] for method in _BYTES]
    ahead = front(chosen, lambda row: (row.share, row.mean))
    axes.step(
        [row.share for row in ahead],
        [row.mean for row in ahead],
        where="post",
        color=FAINT,
        linewidth=1.2,
        zorder=0,
    )
    for row in chosen:
        name, align, right, up = _BYTES[row.method]
        color = ORANGE if row.method in _THEIRS else BLUE
        axes.plot([row.share] * 2, [min(row.losses), max(row.losses)], color=color)
        axes.plot(row.share, row.mean, "o", color=color, markersize=6)
        axes.annotate(
            name,
            (row.share, row.mean),
            xytext=(right, up),
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=9,
            color=color,
        )
    axes.set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="optimizer state, share of AdamW's bytes",
        ylabel="validation loss, nats per byte",
        xlim=(0.033, 1.25),
        ylim=(1.7, 2.015),
    )
    axes.grid()
    return figure


# Page -> rows of the comparison that are its own.
METHODS = {
    "adarankgrad": (
        "adarankgrad signs falling",
        "adarankgrad signs",
        "adarankgrad",
        "adarankgrad 8 bits",
    ),
    "galore": ("galore", "galore 8 bits", "optax_galore"),
    "low_rank_muon": (
        "low_rank_muon dct r=104 8 bits",
        "low_rank_muon r=64 8 bits",
        "low_rank_muon",
        "low_rank_muon 8 bits",
    ),
    "sumo": ("sumo r=64 8 bits", "sumo r=64", "sumo", "sumo 8 bits"),
    "projfactor": ("projfactor",),
    "vlorp": ("vlorp",),
    "ldadam": ("ldadam",),
    "fira": ("fira", "fira, taken=1"),
    "apollo": ("apollo", "apollo_mini"),
}
_BESIDE = ("muon", "adamw", "galore")
_NAMES = {
    "muon": "Muon",
    "adamw": "AdamW",
    "optax_galore": "contrib.galore, d/4",
    "low_rank_muon": "low_rank_muon, d/4",
    "low_rank_muon 8 bits": "low_rank_muon, d/4, 8 bits",
    "low_rank_muon r=64 8 bits": "low_rank_muon, d/2, 8 bits",
    "low_rank_muon dct r=104 8 bits": "low_rank_muon, cosines, 13d/16, 8 bits",
    "sumo": "sumo, d/4",
    "sumo 8 bits": "sumo, d/4, 8 bits",
    "sumo r=64": "sumo, d/2",
    "sumo r=64 8 bits": "sumo, d/2, 8 bits",
    "galore": "galore, d/4",
    "galore 8 bits": "galore, d/4, 8 bits",
    "adarankgrad": "adarankgrad, 3d/8",
    "adarankgrad 8 bits": "adarankgrad, 3d/8, 8 bits",
    "adarankgrad signs": "adarankgrad, signs outside",
    "adarankgrad signs falling": "the same, rank falling",
    "projfactor": "projfactor, c=4 r=8",
    "vlorp": "vlorp, c=4 r=8",
    "ldadam": "ldadam, d/4",
    "fira": "fira, d/4",
    "fira, taken=1": "fira, d/4, taken=1",
    "apollo": "apollo, d/4",
    "apollo_mini": "APOLLO-Mini, r=1",
}


def _strip(own: Iterable[str]) -> Figure:
    """Final losses of each seed: of a method's rows, and of three others beside."""
    found, own = rows(), tuple(own)
    shown = [m for m in found if m in own or m in _BESIDE]
    figure, axes = new(height=1.15 + 0.32 * len(shown))
    for position, method in enumerate(shown):
        row, color = found[method], BLUE if method in own else GREY
        axes.plot(row.losses, [position] * len(row.losses), "o", color=color)
        axes.plot(row.mean, position, "|", color=color, markersize=16)
    axes.axvline(found["adamw"].mean, color=FAINT, linestyle=":")
    axes.set_yticks(range(len(shown)), [_NAMES[method] for method in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set(xlabel="validation loss, nats per byte", xlim=(1.72, 2.12))
    axes.set_xticks((1.8, 1.9, 2.0, 2.1))
    axes.grid(axis="x")
    return figure


FIGURES = {"loss_against_bytes": loss_against_bytes} | {
    f"loss_{page}": (lambda own=own: _strip(own)) for page, own in METHODS.items()
}
