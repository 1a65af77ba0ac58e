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
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
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
        axes.set_yticks(range(len(UPDATES)), [NAMES.get(x, x) for x in UPDATES])
        axes.invert_yaxis()
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
    groups: dict[str, list[tuple[str, dict]]] = {}
    for model, stage in (("350m", "b-step"), ("1b", "b-step"), ("7b", "d-24gb")):
        for card in tables.CARDS:
            for result, _ in tables.on_card(card, stage).values():
                if "milliseconds" in result and result["model"] == model:
                    where = "in subspaces" if result["in_subspace"] else "full"
                    label = f"{_short(result['optimizer'])}, {where}"
                    groups.setdefault(f"{model}, {card}", []).append((label, result))
    figure, axes = new(height=6.4)
    rows, names, row = [], [], 0
    for group, steps in groups.items():
        # The name of a group has a row of its own, without a bar.
        rows.append(row)
        names.append(group)
        for number, (label, result) in enumerate(steps, row + 1):
            _bar(axes, number, result, is_first=number == 1)
            rows.append(number)
            names.append(label)
        row += len(steps) + 1
    axes.set_yticks(rows, names)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("GB of one device")
    axes.grid(axis="x")
    figure.legend(loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure


def _short(optimizer: str) -> str:
    """Returns the name of an optimizer without what all of its steps have."""
    return (
        optimizer.replace(" 8-bit", " 8").replace(", basis ", " + ").replace("-bit", "")
    )


def _bar(axes, row: int, result: dict, is_first: bool) -> None:
    left = 0.0
    for part, colour in PARTS.items():
        size = result["planned_bytes"][part] / 1e9
        label = part if is_first else None
        axes.barh(row, size, left=left, color=colour, label=label, height=0.75)
        left += size
    peak = result["bytes"]["peak"] / 1e9
    label = "peak" if is_first else None
    axes.plot([peak], [row], "|", color=GREY, markersize=9, label=label)


FIGURES = {"update_times": update_times, "step_peaks": step_peaks}
