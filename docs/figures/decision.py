"""The figure that helps to choose a method: questions, and where they lead."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from docs.figures.style import BLUE, FAINT, GREY, new

# Question, the answer that leads to a method, the method, why.
_STEPS = (
    ("Fine-tuning a model\nthat Adam trained?", "adarankgrad", "Adam's update"),
    (
        "No room for full gradients\nof the hidden matrices?",
        "sumo",
        "all inside the subspace",
    ),
    (
        "Adam's update wanted?",
        "adarankgrad",
        "as good as AdamW here",
    ),
    (
        "Reproducing a paper?",
        "galore, fira, ldadam,\napollo, vlorp, projfactor",
        "each page says\nwhere it differs",
    ),
)
_LAST = (
    "low_rank_muon",
    "the best loss for its bytes:\ncosine columns, 13/16 of d, 8 bits",
)


def _box(axes, left, bottom, width, height, color) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="none",
            edgecolor=color,
            linewidth=1.5,
        )
    )


def _arrow(axes, start, end) -> None:
    style = {"arrowstyle": "-|>", "color": FAINT, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def choose() -> Figure:
    """Questions from top to bottom; "yes" leads to the right, "no" down."""
    figure, axes = new(height=5.4)
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(0.5, 11.1))
    for step, (question, method, why) in enumerate(_STEPS):
        middle = 10.2 - 2.2 * step
        _box(axes, 0.1, middle - 0.65, 4.9, 1.3, FAINT)
        axes.text(2.55, middle, question, ha="center", va="center")
        _arrow(axes, (5.0, middle), (6.0, middle))
        axes.text(5.45, middle + 0.2, "yes", ha="center", color=GREY, fontsize=9)
        _answer(axes, 6.0, middle, 3.9, method, why)
        _arrow(axes, (2.55, middle - 0.65), (2.55, middle - 1.55))
        axes.text(2.75, middle - 1.15, "no", color=GREY, fontsize=9)
    _answer(axes, 0.1, 10.2 - 2.2 * len(_STEPS), 4.9, *_LAST)
    return figure


def _answer(axes, left, middle, width, method, why) -> None:
    _box(axes, left, middle - 0.75, width, 1.5, BLUE)
    lines = method.count("\n") + why.count("\n")
    center, up = left + width / 2, 0.3 if lines < 2 else 0.32
    axes.text(
        center,
        middle + up,
        method,
        ha="center",
        va="center",
        color=BLUE,
        weight="bold",
        fontsize=11 if "\n" not in method else 9,
    )
    axes.text(center, middle - up, why, ha="center", va="center", fontsize=9.5)


FIGURES = {"choose": choose}
