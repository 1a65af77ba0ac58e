"""Draws the figures of ``memory_and_speed.md`` out of ``benchmarks/results/``.

``python docs/figures/memory_and_speed.py`` writes ``update_times.svg`` and
``step_peaks.svg`` beside itself.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from benchmarks import tables  # noqa: E402

# Text stays text; a grey and colours of middling lightness read on white and on black.
INK = "#808080"
COLOURS = {"CPU": "#b8860b", "H200": "#4a86c5", "H100": "#c0604a"}
PARTS = {"parameters": "#8a8a8a", "state": "#4a86c5", "temporaries": "#c9a24a"}
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowrank_optax",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

UPDATES = (
    "contrib.galore",
    "range_finder(0.5)",
    "adarankgrad",
    "low_rank_muon",
    "contrib.muon",
)
NAMES = {
    "contrib.galore": "optax.contrib.galore",
    "range_finder(0.5)": "galore, range finder",
    "contrib.muon": "optax.contrib.muon",
}


def update_times() -> Figure:
    """Returns times of an update as multiples of AdamW's, by size and device."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"60m": "60m, float32, rank 128", "1b": "1b, bfloat16, rank 512"}
    for axes, (size, title) in zip(panels, titles.items(), strict=True):
        for card in tables.CARDS:
            result, _ = tables.on_card(card, "a-update")[
                f"{size}, stacked, without renewal"
            ]
            found = [result["alternatives"][name]["ratio_to_adamw"] for name in UPDATES]
            _points(axes, found, range(len(UPDATES)), card)
        if size == "60m":
            cpu = tables.measurements("update-cpu")
            kinds = ("galore", "adarankgrad")
            found = [
                cpu[f"60m {kind} rank 128, stacked, against optax.adamw"][
                    "ratio_median"
                ]
                for kind in kinds
            ]
            _points(axes, found, (1, 2), "CPU")
        axes.set_title(title)
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.grid(axis="x", color=INK, alpha=0.25)
    panels[0].set_yticks(
        range(len(UPDATES)), [NAMES.get(name, name) for name in UPDATES]
    )
    panels[0].invert_yaxis()
    figure.supxlabel("time of an update, AdamW = 1 (log scale)", color=INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    return figure


def _points(axes, found, rows, device) -> None:
    axes.plot(found, rows, "o", color=COLOURS[device], label=device, markersize=7)


def step_peaks() -> Figure:
    """Returns the planned bytes of a training step by kind, with the measured peak."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    steps = [
        (f"{name}, {card}", result)
        for stage in ("b-step", "d-24gb")
        for card in tables.CARDS
        for name, (result, _) in tables.on_card(card, stage).items()
        if "milliseconds" in result
    ]
    steps.sort(key=lambda step: ("350m", "1b", "7b").index(step[1]["model"]))
    labels = [name.replace(" gradients", "") for name, _ in steps]
    rows = range(len(steps))
    left = [0.0] * len(steps)
    for part, colour in PARTS.items():
        sizes = [result["planned_bytes"][part] / 1e9 for _, result in steps]
        axes.barh(rows, sizes, left=left, color=colour, label=part, height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    peaks = [result["bytes"]["peak"] / 1e9 for _, result in steps]
    axes.plot(peaks, rows, "|", color=INK, markersize=13, label="peak, measured")
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlabel("GB of one device")
    axes.grid(axis="x", color=INK, alpha=0.25)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def main() -> None:
    """Writes both figures."""
    for figure in (update_times, step_peaks):
        canvas = FigureCanvasSVG(figure())
        path = HERE / f"{figure.__name__}.svg"
        canvas.print_svg(path, metadata={"Date": None})
        # Matplotlib ends lines with blanks.
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines))
        print(path)


if __name__ == "__main__":
    main()
