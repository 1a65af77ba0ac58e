"""The figures of memory and speed, drawn from ``benchmarks/results/``."""

from matplotlib.figure import Figure

from benchmarks import tables
from docs.figures.style import BLUE, FAINT, GREEN, GREY, ORANGE, new

COLOURS = {"CPU": GREEN, "H200": BLUE, "H100": ORANGE}
PARTS = {"parameters": FAINT, "state": BLUE, "temporaries": ORANGE}
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
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
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
        axes.axvline(1, color=GREY, linewidth=0.8)
        axes.grid(axis="x")
    panels[0].set_yticks(
        range(len(UPDATES)), [NAMES.get(name, name) for name in UPDATES]
    )
    panels[0].invert_yaxis()
    figure.supxlabel("time of an update, AdamW = 1 (log scale)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
    )
    return figure


def _points(axes, found, rows, device) -> None:
    axes.plot(found, rows, "o", color=COLOURS[device], label=device, markersize=7)


def step_peaks() -> Figure:
    """Returns the planned bytes of a training step by kind, with the measured peak."""
    figure, axes = new(height=5.2, width=7.2)
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
    axes.plot(peaks, rows, "|", color=GREY, markersize=13, label="peak, measured")
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlabel("GB of one device")
    axes.grid(axis="x")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


FIGURES = {"update_times": update_times, "step_peaks": step_peaks}
