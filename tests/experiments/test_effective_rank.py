"""Effective ranks are those of every step, weighted by the sides of the matrices."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax
from experiments.run.effective_rank import RankSums, effective_ranks, ranks_vector
from experiments.run.quantities import EFFECTIVE_RANKS, SUMMARY

pytestmark = pytest.mark.usefixtures("fast_compilation")

# Two stacked matrices of 10 x 30, one of 20 x 20, and a bias, which is not projected.
PARAMS = {
    "blocks": {"up": jnp.zeros((2, 10, 30))},
    "pooler": {"kernel": jnp.zeros((20, 20)), "bias": jnp.zeros(20)},
}


def state() -> Any:
    return lowrank_optax.adarankgrad(0.1, 8).init(PARAMS)


def summed(*steps):
    sums = RankSums()
    for ranks in steps:
        sums.add(np.array(ranks, np.int32))
    return sums


def test_ranks_of_a_step_are_one_array_in_the_order_of_the_leaves():
    opt_state = state()
    slots = opt_state[0].subspaces["blocks"]
    slots["up"] = slots["up"]._replace(rank=jnp.array([3, 4], jnp.int32))
    vector = jax.jit(ranks_vector)(opt_state)
    assert vector.dtype == jnp.int32
    assert vector.tolist() == [3, 4, 8]
    assert ranks_vector(()).shape == (0,)


def test_each_matrix_has_its_mean_over_the_steps_and_the_total_is_weighted_by_sides():
    found = effective_ranks(summed([8, 8, 8], [4, 8, 6], [3, 8, 4]), state(), PARAMS, 8)
    assert found["effective_rank_by_layer"] == {
        "blocks/up": [5.0, 8.0],
        "pooler/kernel": 6.0,
    }
    # Sides add up to 40 each: 13 + 6 over three matrices.
    assert found["effective_rank"] == pytest.approx(19 / 3)
    assert found["effective_rank_share"] == pytest.approx(19 * 40 / (300 + 300 + 400))
    assert found["rank_reduction"] == pytest.approx((3 + 0 + 2) * 40)


def test_wider_matrices_count_for_more():
    wide = {"blocks": {"up": jnp.zeros((2, 10, 90))}, "pooler": PARAMS["pooler"]}
    found = effective_ranks(summed([2, 2, 8]), state(), wide, 8)
    assert found["effective_rank"] == pytest.approx((2 * 200 + 8 * 40) / 240)


def test_a_rank_that_stays_saves_nothing():
    found = effective_ranks(summed([8, 8, 8], [8, 8, 8]), state(), PARAMS, 8)
    assert (found["effective_rank"], found["rank_reduction"]) == (8.0, 0.0)
    assert (
        effective_ranks(summed([8, 8, 8]), state(), PARAMS, None)["rank_reduction"]
        is None
    )


def test_without_projections_there_are_no_ranks():
    found = effective_ranks(summed([], []), (), PARAMS, 8)
    assert found.pop("effective_rank_by_layer") == {}
    assert set(found.values()) == {None}


def test_sums_that_a_checkpoint_carries_go_on():
    sums = summed([8, 8, 8], [4, 8, 6])
    again = RankSums(**json.loads(json.dumps(dataclasses.asdict(sums))))
    again.add(jnp.array([3, 8, 4], jnp.int32))
    assert again == summed([8, 8, 8], [4, 8, 6], [3, 8, 4])


def test_ranks_of_another_optimizer_are_not_added():
    sums = summed([8, 8, 8])
    with pytest.raises(ValueError, match="zip"):
        sums.add([8, 8])


def test_the_entries_are_explained():
    found = effective_ranks(RankSums(), (), {}, None)
    assert [quantity.name for quantity in EFFECTIVE_RANKS] == list(found)
    assert set(found) <= {quantity.name for quantity in SUMMARY}
