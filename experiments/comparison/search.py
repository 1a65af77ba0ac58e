"""The search over two learning rates, the same one for every method."""

import math
from collections.abc import Mapping

from experiments.comparison.suites import Contender

# Doublings of the rate of embedding, head and norms, and of that of the blocks.
Point = tuple[int, int]
_NEIGHBOURS: tuple[Point, ...] = ((0, 1), (0, -1), (1, 0), (-1, 0))


def next_point(losses: Mapping[Point, float], most: int) -> Point | None:
    """Returns where to look next; None: the best so far is as good as it gets.

    From the start, (0, 0), the best point's neighbours are tried: the blocks' rate
    doubled and halved, then the other one; where one of them is better, its neighbours.
    It ends where no neighbour is better, or after ``most`` runs. The answer follows
    from the losses alone, so that a search goes on where it was interrupted.

    Args:
        losses: Loss of each point that was tried; infinite where it diverged.
        most: Points to try, >= 1.
    """
    if not losses:
        return (0, 0)
    if len(losses) >= most:
        return None
    rest, blocks = best_point(losses)
    for more_rest, more_blocks in _NEIGHBOURS:
        point = (rest + more_rest, blocks + more_blocks)
        if point not in losses:
            return point
    return None


def best_point(losses: Mapping[Point, float]) -> Point:
    """Returns the point of the least loss; of equal ones the nearest to the start."""
    return min(losses, key=lambda point: (losses[point], math.hypot(*point), point))


def rates_at(contender: Contender, point: Point) -> tuple[float, float]:
    """Returns both learning rates, of the rest and of the blocks, at a point."""
    rest, blocks = point
    start = contender.learning_rate
    return start * 2.0**rest, start * contender.block_scale * 2.0**blocks
