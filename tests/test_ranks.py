"""The rank by energy: what a gradient asks for, smoothed, both ways, no collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax
from lowrank_optax.rules.ranks import as_rank_rule, needed_rank
from tests import references

START = jnp.int32(0)

# Shares in 64ths are exact in float32: sums meet the threshold or miss it, in both.
sorted_shares = st.lists(st.integers(0, 20), min_size=1, max_size=8).map(
    lambda parts: sorted((part / 64 for part in parts), reverse=True)
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sorted_shares, st.integers(1, 63))
def test_needed_rank_is_the_least_that_loses_no_more_than_the_threshold(shares, part):
    padded = np.zeros(8, np.float32)
    padded[: len(shares)] = shares
    expected = references.needed_rank(list(padded), part / 64)
    assert needed_rank(jnp.asarray(padded), part / 64) == expected


def test_needed_rank_is_the_capacity_where_no_rank_is_enough():
    assert needed_rank(jnp.asarray([0.2, 0.1, 0.1]), 0.05) == 3


def test_the_rank_is_the_smoothed_demand_of_the_reference():
    rng = np.random.default_rng(0)
    rule = lowrank_optax.energy_rank(8, threshold=0.1, min_rank=2, smoothing=0.5)
    reference = references.energy_rank(0.1, 2, 8, smoothing=0.5)
    demand = jnp.full(3, 8.0)
    expected = [(8, 8.0)] * 3
    for _ in range(12):
        decay = rng.uniform(0.05, 0.9, size=(3, 1))
        energies = (1 - decay) * decay ** np.arange(8)
        rank, demand = rule.select(jnp.asarray(energies, jnp.float32), demand, START)
        expected = [
            reference(e, d) for e, (_, d) in zip(energies, expected, strict=True)
        ]
        assert rank.dtype == jnp.int32
        # Halves are exact: no rounding decides a ceiling.
        np.testing.assert_array_equal(rank, [r for r, _ in expected])
        np.testing.assert_array_equal(demand, [d for _, d in expected])


def test_without_smoothing_the_last_gradient_alone_decides():
    rule = lowrank_optax.energy_rank(6, threshold=0.2, min_rank=1, smoothing=0.0)
    rank, _ = rule.select(jnp.asarray([0.5, 0.4, 0.1, 0, 0, 0]), jnp.float32(6), START)
    assert rank == 2


def test_the_floor_is_seven_eighths_of_the_capacity_unless_said():
    assert lowrank_optax.energy_rank(32).min_rank == 28
    assert lowrank_optax.energy_rank(3).min_rank == 2
    rank, _ = lowrank_optax.energy_rank(8, smoothing=0.0).select(
        jnp.asarray([1.0] + [0.0] * 7), jnp.float32(8), START
    )
    assert rank == 7


def test_the_capacity_is_the_states_and_not_the_constructors():
    # A state that was cut to 3 columns, below the floor of 8.
    for rule in (lowrank_optax.energy_rank(16), as_rank_rule(16)):
        energies = jnp.asarray([[0.4, 0.1, 0.1]])
        rank, _ = rule.select(energies, jnp.asarray([16.0]), START)
        np.testing.assert_array_equal(rank, [3])


def test_a_schedule_lowers_the_floor_and_a_demand_above_it_counts():
    floor = optax.linear_schedule(16, 4, 100)
    rule = lowrank_optax.energy_rank(16, 0.1, min_rank=floor, smoothing=0.0)
    one, many = np.zeros(16), np.full(16, 1 / 16)
    one[0] = 1
    energies, demand = jnp.asarray([one, many], jnp.float32), jnp.full(2, 16.0)
    found = {}
    for count in (0, 50, 99, 100, 1000):
        rank, demand = jax.jit(rule.select)(energies, demand, jnp.int32(count))
        assert rank.dtype == jnp.int32
        found[count] = rank.tolist()
    # 15 of 16 equal columns keep more than nine tenths.
    assert found == {
        0: [16, 16],
        50: [10, 15],
        99: [4, 15],
        100: [4, 15],
        1000: [4, 15],
    }


def test_a_floor_by_schedule_stays_in_one_to_the_capacity():
    for wanted, expected in ((-3.0, 1), (99.0, 8)):
        rule = lowrank_optax.energy_rank(8, 0.5, lambda count, x=wanted: x, 0.0)
        rank, _ = rule.select(jnp.asarray([1.0] + [0.0] * 7), jnp.float32(8), START)
        assert rank == expected


def test_the_ranks_of_a_run_follow_the_schedule_of_the_floor():
    rng = np.random.default_rng(0)
    tx = lowrank_optax.adarankgrad(
        1.0,
        rank=lowrank_optax.energy_rank(8, 0.5, optax.linear_schedule(8, 2, 6), 0.0),
        refresh=lowrank_optax.every(2),
    )
    params = _gradient(rng, 1)
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    for _ in range(9):
        _, state = update(_gradient(rng, 1), state, params)
        seen.append(int(lowrank_optax.ranks(state)["['w']"]))
    # Bases are renewed at updates 0, 2, 4, 6, 8; there the floor is 8, 6, 4, 2, 2.
    assert seen == [8, 8, 6, 6, 4, 4, 2, 2, 2]


def _gradient(rng, rank):
    u, v = rng.normal(size=(16, rank)), rng.normal(size=(12, rank))
    return {"w": jnp.asarray(u @ v.T, jnp.float32)}


def test_adarankgrads_rank_follows_the_gradients_both_ways_and_does_not_collapse():
    rng = np.random.default_rng(0)
    tx = lowrank_optax.adarankgrad(
        1.0,
        rank=lowrank_optax.energy_rank(8, threshold=0.01, min_rank=2),
        refresh=lowrank_optax.every(2),
    )
    params = _gradient(rng, 12)
    state, update = tx.init(params), jax.jit(tx.update)
    seen = {}
    # The beginning of a pre-training: rank one at first, many directions later.
    for phase, rank in (("one", 1), ("many", 12), ("three", 3)):
        seen[phase] = []
        for _ in range(12):
            _, state = update(_gradient(rng, rank), state, params)
            seen[phase].append(int(lowrank_optax.ranks(state)["['w']"]))
            basis = np.asarray(state[0].subspaces["w"].basis)
            in_use = np.count_nonzero(np.any(basis != 0, axis=0))
            assert in_use == seen[phase][-1], "columns at or above the rank are zero"
    # One gradient of rank one asks for 1 and does not decide; many bring the floor.
    assert seen["one"][0] == 5
    assert seen["one"][-1] == 2
    assert seen["many"][-1] == 8
    assert seen["three"][-1] in (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rank": 0}, "max_rank must be an int >= 1, got 0"),
        ({"max_rank": 2.5}, "max_rank must be an int >= 1, got 2.5"),
        ({"max_rank": True}, "max_rank must be an int >= 1, got True"),
        ({"threshold": 0.0}, r"threshold must be inside \(0, 1\), got 0.0"),
        ({"threshold": 1}, r"threshold must be inside \(0, 1\), got 1"),
        ({"min_rank": 0}, r"min_rank must be in 1\.\.8, got 0"),
        ({"min_rank": 9}, r"min_rank must be in 1\.\.8, got 9"),
        ({"min_rank": np.int64(9)}, r"min_rank must be in 1\.\.8, got 9"),
        ({"smoothing": 1.0}, r"smoothing must be inside \[0, 1\), got 1.0"),
        ({"smoothing": -0.1}, r"smoothing must be inside \[0, 1\), got -0.1"),
    ],
)
def test_a_value_out_of_its_range_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        lowrank_optax.energy_rank(**{"max_rank": 8, **arguments})


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_raises(rank):
    match = f"^rank must be an int >= 1, got {rank}"
    with pytest.raises(ValueError, match=match):
        lowrank_optax.scale_by_low_rank(optax.identity(), rank)
    with pytest.raises(ValueError, match=match):
        lowrank_optax.adarankgrad(0.1, rank)


@pytest.mark.parametrize("rank", ["8", 8.0, True, None])
def test_a_rank_that_is_neither_int_nor_rule_raises(rank):
    with pytest.raises(TypeError, match="rank must be an int or a rank rule, got"):
        lowrank_optax.scale_by_low_rank(optax.identity(), rank)
