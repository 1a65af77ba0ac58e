"""The few lengths that batches are padded to."""

from collections.abc import Iterable

import numpy as np

MOST_BUCKETS = 4
_MULTIPLE = 8
# Forward and backward of a training batch, against forward alone.
_COST_OF_TRAINING = 3.0
# Of the tokens that the best 4 buckets compute, the share that fewer may compute more:
# each bucket is a step to compile.
_TOLERANCE = 0.1


def bucket_lengths(
    train: np.ndarray,
    validation: Iterable[np.ndarray],
    batch_size: int,
    longest: int | None = None,
) -> tuple[int, ...]:
    r"""Chooses the lengths that make the expected number of computed tokens least.

    A batch is padded to the smallest bucket that holds its longest example. Of B random
    training examples the longest has at most l tokens with probability F(l)^B, F(l) the
    share of examples of at most l; validation batches, in order of length, are known.
    Both give a weight w(l) to every multiple of 8: how many batches of an epoch and its
    validation have their longest example just below l, a training batch counted three
    times because of its backward pass. A dynamic program then minimises
    :math:`\sum_l w(l)\,b(l)`, b(l) the smallest bucket that is at least l, over all
    sets of k buckets, the last of which holds the longest example. k is the least one
    that computes at most a tenth more than 4 buckets.

    Args:
        train: Tokens of each training example, (n,), integers >= 1; n >= 1.
        validation: The same for each validation split.
        batch_size: B, >= 1.
        longest: Most tokens of a sequence that the model has positions for; the last
            bucket is this one if the next multiple of 8 is above it. None: any.

    Returns:
        Ascending: at most 4 multiples of 8, the last maybe ``longest``.

    Example:
        >>> lengths = np.array([5] * 99 + [60])
        >>> bucket_lengths(lengths, [], batch_size=4)
        (8, 64)
    """
    validation = list(validation)
    top = -(-max(map(np.max, [train, *validation])) // _MULTIPLE)
    candidates = _MULTIPLE * np.arange(top + 1)
    share = np.searchsorted(np.sort(train), candidates, "right") / len(train)
    steps = -(-len(train) // batch_size)
    weights = _COST_OF_TRAINING * steps * np.diff(share**batch_size, prepend=0.0)
    for lengths in validation:
        for part in in_order_of_length(lengths, batch_size):
            weights[-(-lengths[part[-1]] // _MULTIPLE)] += 1
    found = [_least_cost(weights, candidates, k) for k in range(1, MOST_BUCKETS + 1)]
    enough = (1 + _TOLERANCE) * found[-1][1]
    places = next(places for places, cost in found if cost <= enough)
    chosen = [int(candidates[i]) for i in places]
    if longest is not None:
        chosen[-1] = min(chosen[-1], longest)
    return tuple(chosen)


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest bucket that holds ``length`` tokens, <= the last bucket."""
    return next(bucket for bucket in buckets if length <= bucket)


def in_order_of_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns the places of each validation batch, shortest first; the last is short.

    Examples of equal length keep their order.
    """
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _least_cost(weights, candidates, most):
    """Returns places of at most so many candidates, the last among them, and the cost.

    cost[j] is the least cost of all batches up to candidate j, which is a bucket.
    """
    below = np.cumsum(weights)
    cost = below * candidates
    choices = []
    for _ in range(most - 1):
        # extended[i, j]: i is the bucket before j, and pays for what it holds.
        extended = cost[:, None] + (below[None] - below[:, None]) * candidates[None]
        extended[np.tril_indices(len(cost), -1)] = np.inf
        choices.append(np.argmin(extended, axis=0))
        cost = np.min(extended, axis=0)
    places = [len(cost) - 1]
    for choice in reversed(choices):
        places.append(int(choice[places[-1]]))
    return sorted(set(places) - {0}), cost[-1]
