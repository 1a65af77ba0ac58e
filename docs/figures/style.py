"""How the figures look: sizes, greys and colours that read on white and on black."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

DIRECTORY = Path(__file__).parent
STATES = DIRECTORY / "states.json"

# Each is about as far from white as from black.
GREY = "#767676"
FAINT = "#a3a3a3"
BLUE, ORANGE, GREEN, PURPLE = "#3987c9", "#cf6f1c", "#2b9a6e", "#a86bc2"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, GREY)

_SETTINGS: dict[Any, Any] = {
    # Text stays text: it can be selected and searched, and scales with the page.
    "svg.fonttype": "none",
    # Identifiers are a function of the drawing alone.
    "svg.hashsalt": "lowrank_optax",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "axes.prop_cycle": cycler(color=CYCLE),
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def settings() -> Any:
    """Returns the context inside which figures are drawn and written."""
    return matplotlib.rc_context(_SETTINGS)


def new(height: float = 3.4, width: float = 5.2) -> tuple[Figure, Any]:
    """Returns a figure of one panel, and its axes.

    A phone shows 5.2 inches at two thirds: 11 points are well read there.

    Args:
        height: In inches.
        width: In inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure) -> str:
    """Returns a figure as SVG, the same text each time."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    # Matplotlib ends lines with blanks.
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())
