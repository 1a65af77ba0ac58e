"""The search over two learning rates, the same for every method."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from experiments.comparison.suite import Contender, Suite

# Doublings of two rates: that of embedding, head and norms, and that of the blocks.
Point = tuple[int, int]
_NEIGHBOURS: tuple[Point, ...] = ((0, 1), (0, -1), (1, 0), (-1, 0))


def searched_rates(
    contender: Contender,
    suite: Suite,
    run: Callable[[tuple[float, float]], Mapping[str, Any]],
) -> tuple[float, float]:
    """Returns the best rates of a method, of the rest and of the blocks.

    Args:
        contender: The method.
        suite: With the number of runs, and what is compared.
        run: Rates -> the record of the run with the first seed.
    """
    costs: dict[Point, float] = {}
    while True:
        point = next_point(costs, suite.search, has_blocks=contender.trains_blocks)
        if point is None:
            return rates_at(contender, best_point(costs))
        costs[point] = suite.measure.cost(run(rates_at(contender, point)))


def next_point(
    losses: Mapping[Point, float], most: int, *, has_blocks: bool = True
) -> Point | None:
    """Returns the next point to try; None at the end of the search.

    The search starts at (0, 0), and tries the neighbours of the best point: the blocks'
    rate doubled and halved, then the other rate. A better neighbour becomes the best
    point. The search ends if no neighbour is better, or after ``most`` runs. The next
    point follows from the losses alone, so that an interrupted search can continue.

    Args:
        losses: Loss of each tried point; infinite if the run diverged.
        most: Points to try, >= 1.
        has_blocks: Whether the blocks' rate is searched too.
    """
    if not losses:
        return (0, 0)
    if len(losses) >= most:
        return None
    rest, blocks = best_point(losses)
    for more_rest, more_blocks in _NEIGHBOURS if has_blocks else _NEIGHBOURS[2:]:
        point = (rest + more_rest, blocks + more_blocks)
        if point not in losses:
            return point
    return None


def untried(
    best: tuple[float, float], tried: Collection[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Returns the neighbours of the best rates that are not among those tried."""

    def near(ours, theirs):
        return all(math.isclose(a, b) for a, b in zip(ours, theirs, strict=True))

    rest, blocks = best
    around = [(rest * 2.0**i, blocks * 2.0**j) for i, j in _NEIGHBOURS]
    return [point for point in around if not any(near(point, x) for x in tried)]


def best_point(losses: Mapping[Point, float]) -> Point:
    """Returns the point with the least loss; among equals the nearest to the start."""
    return min(losses, key=lambda point: (losses[point], math.hypot(*point), point))


def rates_at(contender: Contender, point: Point) -> tuple[float, float]:
    """Returns the learning rates of the rest and of the blocks at a point."""
    rest, blocks = point
    start = contender.learning_rate
    return start * 2.0**rest, start * contender.block_scale * 2.0**blocks
