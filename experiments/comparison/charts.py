"""The figures of a comparison."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.comparison.measures import Measure
from experiments.comparison.rows import Row, front

_MARKERS = "os^vD<>pPX*"


def draw(directory: Path, rows: Sequence[Row], measure: Measure, label: str) -> None:
    """Draws the figures; none of no rows.

    Args:
        directory: Of the comparison.
        rows: Those that did not diverge.
        measure: What is compared.
        label: Of its axes.
    """
    if not rows:
        return
    figures = {
        f"{measure.name}-tokens": _curves(rows, 0, "tokens", label),
        f"{measure.name}-time": _curves(rows, 1, "seconds of training", label),
        f"{measure.name}-bytes": _bytes(rows, measure, label),
        "ranks": _ranks(rows),
    }
    for name, figure in figures.items():
        FigureCanvasSVG(figure).print_svg(directory / f"{name}.svg")


def _curves(rows: Sequence[Row], place: int, xlabel: str, ylabel: str) -> Figure:
    """Draws each row's first seed against a coordinate of the curve."""
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
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=7, ncols=2)
    return figure


def _bytes(rows: Sequence[Row], measure: Measure, label: str) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    ahead = front(rows, lambda row: (row.share, row.mean))
    for row in rows:
        place = row.share, measure.flipped(row.mean)
        numbers = list(map(measure.flipped, row.losses))
        axes.plot([row.share] * len(numbers), numbers, ".", color="0.7")
        axes.plot(*place, "o", color="C1" if row in ahead else "C0")
        axes.annotate(
            row.method, place, xytext=(5, 3), textcoords="offset points", fontsize=7
        )
    axes.step(
        [row.share for row in ahead],
        [measure.flipped(row.mean) for row in ahead],
        where="post",
        color="C1",
        label="Pareto front",
    )
    axes.set(
        xscale="log",
        xlabel="optimizer state, share of AdamW's bytes",
        ylabel=label,
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
