"""Rounds of a search over two learning rates: many points at once."""

import itertools
from collections.abc import Mapping

from experiments.comparison.search import Point, best_point

_CROSS: tuple[Point, ...] = ((0, 1), (0, -1), (1, 0), (-1, 0))
_BLOCK: list[Point] = list(itertools.product((-1, 0, 1), (-1, 0, 1)))


def next_points(losses: Mapping[Point, float], most: int) -> list[Point]:
    """Returns the points of the next round; none, if the best is inside its neighbours.

    The first round has the start and all points around it. A later round has what is
    still untried around the best point, its four neighbours first.

    Args:
        losses: Loss of each tried point; infinite if the run diverged.
        most: Points of a round, >= 4.
    """
    if not losses:
        first = sorted(_BLOCK, key=lambda point: sum(map(abs, point)))
        return first[:most]
    if is_inside(losses):
        return []
    around = [_moved(best_point(losses), step) for step in (*_CROSS, *_BLOCK)]
    untried = dict.fromkeys(point for point in around if point not in losses)
    return list(untried)[:most]


def is_inside(losses: Mapping[Point, float]) -> bool:
    """Returns whether the neighbours of the best point are tried, and none is better.

    Args:
        losses: Loss of each tried point.
    """
    best = best_point(losses)
    return all(_moved(best, step) in losses for step in _CROSS)


def _moved(point: Point, step: Point) -> Point:
    return (point[0] + step[0], point[1] + step[1])
