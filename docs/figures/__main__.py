"""Draws every figure of the documentation anew: ``python -m docs.figures``."""

from benchmarks.harness import parse_no_flags
from docs.figures import concepts, decision, holds, losses, memory_and_speed, roles
from docs.figures.style import DIRECTORY, as_svg, settings

FIGURES = (
    concepts.FIGURES
    | decision.FIGURES
    | holds.FIGURES
    | losses.FIGURES
    | memory_and_speed.FIGURES
    | roles.FIGURES
)


def main() -> None:
    """Writes one SVG for each figure."""
    with settings():
        for name, draw in FIGURES.items():
            path = DIRECTORY / f"{name}.svg"
            path.write_text(as_svg(draw()), encoding="utf-8")
            print(path)


if __name__ == "__main__":
    parse_no_flags(__doc__)
    main()
