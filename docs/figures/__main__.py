"""Draws every figure of the documentation anew: ``python -m docs.figures``."""

from docs.figures import concepts, losses
from docs.figures.style import DIRECTORY, as_svg, settings

FIGURES = concepts.FIGURES | losses.FIGURES


def main() -> None:
    """Writes one SVG for each figure."""
    with settings():
        for name, draw in FIGURES.items():
            as_svg(draw(), DIRECTORY / f"{name}.svg")
            print(DIRECTORY / f"{name}.svg")


if __name__ == "__main__":
    main()
