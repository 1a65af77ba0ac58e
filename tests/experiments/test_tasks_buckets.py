import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.buckets import (
    MOST_BUCKETS,
    bucket_lengths,
    in_order_of_length,
)

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def batches_by_length(train, validation, batch_size):
    """Weight of the batches whose longest example has 1, 2, ... tokens."""
    weights = np.zeros(max(*train, *validation) + 1)
    steps = -(-len(train) // batch_size)
    for length in range(1, len(weights)):
        share = [np.mean(train <= l) ** batch_size for l in (length - 1, length)]
        weights[length] = 3 * steps * (share[1] - share[0])
    ordered = np.sort(validation)
    for first in range(0, len(ordered), batch_size):
        weights[ordered[first : first + batch_size][-1]] += 1
    return weights


def cost(buckets, weights):
    """Tokens that are computed for one epoch and its validation."""
    places = np.searchsorted(buckets, np.arange(len(weights)))
    return weights @ np.array(buckets)[places]


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(1, 9))
def test_no_other_buckets_cost_less(train, validation, batch_size):
    train, validation = np.array(train), np.array(validation)
    chosen = bucket_lengths(train, [validation], batch_size)
    top = -(-max(*train, *validation) // 8) * 8
    weights = batches_by_length(train, validation, batch_size)
    costs = [
        min(
            cost((*lower, top), weights)
            for lower in itertools.combinations(range(8, top, 8), count)
        )
        for count in range(min(MOST_BUCKETS, top // 8))
    ]
    # Float64 sums in another order.
    assert cost(chosen, weights) <= min(costs) * 1.1 * (1 + 1e-9)
    # Fewer buckets would compute more than a tenth more tokens than the most.
    fewer = costs[: len(chosen) - 1]
    assert all(x > min(costs) * 1.1 * (1 - 1e-9) for x in fewer)
    assert cost(chosen, weights) <= costs[len(chosen) - 1] * (1 + 1e-9)


@given(SIZES, SIZES, st.integers(1, 9))
def test_buckets_are_few_multiples_of_8_that_hold_everything(train, validation, size):
    buckets = bucket_lengths(np.array(train), [np.array(validation)], size)
    assert 1 <= len(buckets) <= 4
    assert all(bucket % 8 == 0 and bucket > 0 for bucket in buckets)
    assert list(buckets) == sorted(set(buckets))
    assert 0 <= buckets[-1] - max(*train, *validation) < 8


def test_what_most_batches_need_is_a_bucket():
    # 7 batches of 8 have a sentence of 33 tokens, and all are of 60 at most.
    train = np.array([20] * 78 + [33] * 20 + [60])
    assert bucket_lengths(train, [], batch_size=8) == (40, 64)
    # Validation batches, in order of length, are shorter.
    assert bucket_lengths(train, [np.array([5] * 64)], 8) == (8, 40, 64)


def test_a_training_batch_costs_three_times_a_validation_batch():
    # Chosen so that 1 instead of 3 would give (8, 40, 56), and 9 (56,).
    train = np.array([48, 8, 32, 56, 40, 8, 56, 48, 56, 16, 8, 56])
    validation = np.array([8, 40, 8, 24, 32, 32, 32, 8, 8, 8])
    assert bucket_lengths(train, [validation], 4) == (40, 56)


def test_the_last_bucket_is_not_above_the_positions():
    assert bucket_lengths(np.array([17, 20]), [], 1, longest=20) == (20,)
    assert bucket_lengths(np.array([17, 20]), [], 1, longest=64) == (24,)


def test_validation_batches_are_in_order_of_length():
    parts = in_order_of_length(np.array([5, 3, 9, 3]), 3)
    assert [list(part) for part in parts] == [[1, 3, 0], [2]]
