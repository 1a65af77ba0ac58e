"""A budget of bytes: the rank that it comes to, and how the leaves share it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import budget, capacities, reallocate
from lowrank_optax.codes import bytes_of
from lowrank_optax.rules.budget import Size, largest_fitting, parse_bytes
from lowrank_optax.storage.allocation import allocate, energies, spectrum
from lowrank_optax.storage.resize import Columns
from tests.suite import averaging, random_like, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

SHAPES = {"flat": (64, 40), "steep": (2, 48, 64), "bias": (40,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
METHODS = {
    "galore": lambda rank: lowrank_optax.galore(0.1, rank, update_proj_gap=3),
    "adarankgrad": lambda rank: lowrank_optax.adarankgrad(0.1, rank),
    "8 bits": lambda rank: lowrank_optax.low_bit(
        lowrank_optax.galore(0.1, rank, update_proj_gap=3), 8, 4, min_size=1
    ),
    "sumo": lambda rank: lowrank_optax.sumo(0.1, rank),
    "low_rank_muon": lambda rank: lowrank_optax.low_rank_muon(0.1, rank),
    "momentum": lambda rank: lowrank_optax.scale_by_low_rank(optax.trace(0.9), rank),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1234, 1234),
        ("1234", 1234),
        ("600MB", 600_000_000),
        ("1.5 GiB", 1_610_612_736),
        (" 2kb ", 2000),
        ("0.5KiB", 512),
        ("3 GB", 3_000_000_000),
        ("2mib", 2_097_152),
        ("1", 1),
    ],
)
def test_bytes_are_read(text, expected):
    assert parse_bytes(text) == expected
    assert budget(text).limit == expected


@pytest.mark.parametrize(
    "text", ["", "MB", "12XB", "-5MB", "0", "0.9", "1.2.3GB", "x", 0]
)
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="is not a number of bytes"):
        budget(text)


@pytest.mark.parametrize("limit", [20_000, 40_000])
@pytest.mark.parametrize("name", METHODS)
def test_the_state_fits_and_one_column_more_would_not(name, limit):
    make = METHODS[name]
    state = make(budget(limit)).init(PARAMS)
    (rank,) = set(capacities(state).values())
    assert bytes_of(state) <= limit
    assert bytes_of(make(rank).init(PARAMS)) == bytes_of(state)
    if rank < 39:
        assert bytes_of(make(rank + 1).init(PARAMS)) > limit


def test_low_bits_buy_columns():
    (plain,) = set(capacities(METHODS["galore"](budget(20_000)).init(PARAMS)).values())
    (coded,) = set(capacities(METHODS["8 bits"](budget(20_000)).init(PARAMS)).values())
    assert coded > 3 * plain


def test_a_budget_below_the_least_names_the_least():
    least = bytes_of(METHODS["galore"](1).init(PARAMS))
    with pytest.raises(ValueError, match=f"least state takes {least:,} bytes at"):
        METHODS["galore"](budget(least - 1)).init(PARAMS)
    state = METHODS["galore"](budget(least)).init(PARAMS)
    assert set(capacities(state).values()) == {1}


def test_a_random_basis_has_no_budget():
    with pytest.raises(ValueError, match="a random basis is not stored, so that no"):
        lowrank_optax.vlorp(0.1, budget("1MB"), 2)


def test_the_plan_lists_the_rank_of_the_budget():
    optimizer = METHODS["galore"](budget(20_000))
    (rank,) = set(capacities(optimizer.init(PARAMS)).values())
    plans = lowrank_optax.projections(optimizer, PARAMS)
    assert {x.capacity for x in plans.values() if x.is_projected} == {rank}


# Leaves go to full size at 12 and 15, and arrays to fewer bits at other ranks.
SEVERAL = {f"s{i}": (12, 40) for i in range(4)} | {"l": (15, 15), "flat": (7, 60)}
STORED = {
    "float32": lambda rank: lowrank_optax.galore(0.1, rank),
    "8 bits": lambda rank: lowrank_optax.low_bit(
        lowrank_optax.adarankgrad(0.1, rank), 8, 8, min_size=200, block=16
    ),
    "4 bits": lambda rank: lowrank_optax.low_bit(
        lowrank_optax.galore(0.1, rank), None, 4, min_size=200
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_no_larger_rank_fits_where_bytes_fall_with_the_rank(name):
    """Against the bytes of every rank, at every limit at which the answer changes."""
    params = {key: jax.ShapeDtypeStruct(x, jnp.float32) for key, x in SEVERAL.items()}

    def state_of(rank):
        return jax.eval_shape(STORED[name](rank).init, params)

    sizes = {rank: bytes_of(state_of(rank)) for rank in range(1, 15)}
    assert any(sizes[rank] > sizes[rank + 1] for rank in range(1, 14))
    for limit in sorted(sizes.values()):
        best = max(rank for rank, size in sizes.items() if size <= limit)
        (found,) = set(capacities(state_of(budget(limit))).values())
        assert found == best, limit
    least = min(sizes, key=lambda rank: sizes[rank])
    message = f"least state takes {sizes[least]:,} bytes at rank {least}\\."
    with pytest.raises(ValueError, match=message):
        state_of(budget(sizes[least] - 1))


@pytest.mark.parametrize("seed", range(5))
def test_largest_fitting_is_the_largest_and_asks_for_few_ranks(seed):
    """Sizes that rise but for some ranks, of which some are known."""
    rng = np.random.default_rng(seed)
    most = 200
    changes = np.sort(rng.choice(np.arange(2, most), size=6, replace=False))
    layouts = np.searchsorted(changes, np.arange(most + 1), side="right")
    sizes = np.cumsum(rng.integers(0, 9, size=most + 1))
    sizes = sizes + 100 - sizes[np.append(0, changes)[layouts]]
    sizes += rng.integers(0, 300, size=7)[layouts]
    known = sorted({*(int(x) - 1 for x in changes[::2]), most})
    for limit in np.unique(sizes[1:]):
        asked = []

        def size_at(rank, asked=asked):
            asked.append(rank)
            return Size(int(sizes[rank]), int(layouts[rank]))

        found = largest_fitting(size_at, int(limit), known)
        assert found == np.flatnonzero(sizes[1:] <= limit).max() + 1
        assert len(asked) == len(set(asked))
        # Both ends of the ranges, two ways to each change that is not known, one
        # bisection.
        assert len(asked) <= 2 * len(known) + (2 * 3 + 1) * 8


def test_a_budget_that_holds_the_known_ranks_alone_asks_for_two_of_each_and_bisects():
    asked = []

    def size_at(rank):
        asked.append(rank)
        return Size(1000 + rank % 100, rank // 100)

    assert largest_fitting(size_at, 1049, [99, 199, 299, 399]) == 349
    assert len(asked) <= 2 + 7
    asked.clear()
    with pytest.raises(ValueError, match="1,000 bytes at rank 300"):
        largest_fitting(size_at, 999, [99, 199, 299, 399])
    assert len(asked) == 8


def gradients(step):
    """A flat spectrum in one leaf, a steep one in the other."""
    rng = np.random.default_rng(step)
    steep = np.exp(-0.5 * np.arange(64))
    return {
        "flat": jnp.asarray(rng.normal(size=SHAPES["flat"]), jnp.float32),
        "steep": jnp.asarray(rng.normal(size=SHAPES["steep"]) * steep, jnp.float32),
        "bias": jnp.zeros(40),
    }


def trained(name, rank, steps=6):
    optimizer = METHODS[name](rank)
    update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(PARAMS)
    for step in range(steps):
        _, state = update(gradients(step), state, PARAMS)
    return update, state


def captured(state, grads):
    """Returns the captured energy, as a share of each leaf's."""
    shares = []
    for name in ("flat", "steep"):
        basis = lowrank_optax.decode(state[0].subspaces[name].basis)
        grad = grads[name]
        if basis.shape[-2] == grad.shape[-2] != grad.shape[-1]:
            grad = jnp.swapaxes(grad, -1, -2)
        shares.append(jnp.sum((grad @ basis) ** 2) / jnp.sum(grad**2))
    return np.asarray(shares)


@pytest.mark.parametrize("name", ["galore", "8 bits"])
def test_spread_columns_capture_more_for_the_same_bytes(name):
    update, uniform = trained(name, 12)
    spread = reallocate(uniform, bucket=4)
    found = capacities(spread)
    assert found["['flat']"] > 12 > found["['steep']"]
    assert bytes_of(spread) <= bytes_of(uniform)
    # One refresh fills the new columns.
    for step in range(6, 10):
        _, spread = update(gradients(step), spread, PARAMS)
        _, uniform = update(gradients(step), uniform, PARAMS)
    ranks = lowrank_optax.ranks(spread)
    assert all(np.all(ranks[path] == found[path]) for path in found)
    gain = captured(spread, gradients(9)) - captured(uniform, gradients(9))
    assert np.mean(gain) > 0.05


def test_what_remains_is_the_same():
    _, state = trained("galore", 12)
    spread = reallocate(state, bucket=4)
    k = capacities(spread)["['steep']"]
    for field in ("mu", "nu"):
        before = getattr(state[0].inner_state, field)["steep"]
        after = getattr(spread[0].inner_state, field)["steep"]
        np.testing.assert_array_equal(after, before[..., :k])
    assert np.all(lowrank_optax.ranks(spread)["['steep']"] == k)
    grown = spread[0].subspaces["flat"].basis[..., 12:]
    assert grown.shape[-1] > 0
    assert not np.any(grown)


def test_energies_are_those_of_the_second_moment_or_of_the_momentum():
    _, state = trained("galore", 12)
    nu = np.asarray(state[0].inner_state.nu["steep"], np.float64)
    np.testing.assert_allclose(
        energies(state)["['steep']"], nu.sum(axis=(0, 1)), rtol=1e-5
    )
    _, state = trained("momentum", 12)
    trace = np.asarray(state.inner_state.trace["flat"], np.float64)
    np.testing.assert_allclose(
        energies(state)["['flat']"], (trace**2).sum(axis=0), rtol=1e-5
    )


def test_a_moment_that_is_named_is_spread_as_a_known_one():
    moments = {"avg": "first"}
    tx = lowrank_optax.scale_by_low_rank(averaging(), 12, moments=moments)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for step in range(6):
        _, state = update(gradients(step), state, PARAMS)
    with pytest.raises(ValueError, match=r"no moment .* its arrays are basis, avg"):
        reallocate(state, bucket=4)
    _, known = trained("momentum", 12)
    np.testing.assert_array_equal(
        state.inner_state.avg["flat"], known.inner_state.trace["flat"]
    )
    expected = reallocate(known, bucket=4)
    spread = reallocate(state, bucket=4, moments=moments)
    assert capacities(spread) == capacities(expected) != capacities(state)


def test_a_limit_is_kept_and_one_too_low_is_refused():
    _, state = trained("galore", 12)
    smaller = reallocate(state, 15_000, bucket=4)
    spent = sum(
        leaf.capacity * leaf.bytes_per_column
        for leaf in lowrank_optax.columns(smaller).values()
    )
    assert 13_000 < spent <= 15_000
    with pytest.raises(ValueError, match=r"1,000 bytes are below the least, [0-9,]+:"):
        reallocate(state, 1000, bucket=4)
    with pytest.raises(ValueError, match="weight"):
        reallocate(state, weight="size")
    for bucket in (0, 2.5):
        with pytest.raises(ValueError, match="bucket must be an int >= 1"):
            reallocate(state, bucket=bucket)
    assert lowrank_optax.capacities(
        reallocate(state, "15 kB", bucket=4)
    ) == lowrank_optax.capacities(smaller)
    with pytest.raises(ValueError, match="much"):
        reallocate(state, "much")


@pytest.mark.parametrize("weight", ["energy", "share"])
def test_no_other_allocation_captures_more(weight):
    """Against every allocation in whole buckets, for leaves of the same cost."""
    rng = np.random.default_rng(0)
    leaves = {name: Columns(4, 4, 4.0, 13, 13, 10.0) for name in "abc"}
    found = {name: np.sort(rng.exponential(size=12))[::-1] for name in "abc"}
    limit, bucket = 180, 2
    actual = allocate(leaves, found, limit, bucket, weight)
    spectra = {name: spectrum(x, 12) for name, x in found.items()}
    if weight == "share":
        spectra = {name: x / x.sum() for name, x in spectra.items()}

    def value(wanted):
        return sum(spectra[name][:k].sum() for name, k in wanted.items())

    options = itertools.product(range(bucket, 13, bucket), repeat=3)
    allowed = [
        dict(zip("abc", x, strict=True)) for x in options if sum(x) * 10 <= limit
    ]
    assert value(actual) == pytest.approx(max(map(value, allowed)))


def test_a_leaf_gets_no_more_columns_than_either_side_has():
    leaves = {
        "a": Columns(4, 4, 4.0, 20, 6, 10.0),
        "b": Columns(4, 4, 4.0, 6, 20, 10.0),
    }
    found = allocate(leaves, dict.fromkeys("ab", np.ones(4)), 10_000, 2, "share")
    assert found == {"a": 5, "b": 5}


def test_the_power_law_goes_on():
    captured = 1 / np.arange(1, 9) ** 2.0
    np.testing.assert_allclose(
        spectrum(captured, 16), 1 / np.arange(1, 17) ** 2.0, rtol=1e-12
    )
    np.testing.assert_array_equal(spectrum(captured, 4), captured[:4])
    np.testing.assert_array_equal(spectrum(np.zeros(3), 5), np.zeros(5))


def test_a_budget_needs_no_new_program_until_it_is_spread():
    update, state = trained("galore", budget(30_000), steps=2)
    assert types(update(gradients(2), state, PARAMS)[1]) == types(state)


def test_a_bucket_too_dear_for_what_is_left_makes_room_for_a_cheaper_one():
    leaves = {
        "dear": Columns(4, 4, 4.0, 13, 13, 100.0),
        "cheap": Columns(4, 4, 4.0, 13, 13, 1.0),
    }
    found = {"dear": 1e6 * np.ones(12), "cheap": np.ones(12)}
    # 2 columns each take 202 bytes; two more of "dear" would take 200.
    assert allocate(leaves, found, 220, 2, "energy") == {"dear": 2, "cheap": 12}


def test_a_power_law_falls_by_the_root_at_least():
    """A flat spectrum would not fall off: further columns count less and less."""

    np.testing.assert_allclose(
        spectrum(np.ones(4), 16)[4:], (4 / np.arange(5, 17)) ** 0.5, rtol=1e-12
    )


def test_a_share_is_of_the_sum_of_a_leafs_energies():
    """In a long flat leaf each column has a small share, and as much as its largest."""

    leaves = {
        "long": Columns(4, 4, 4.0, 25, 25, 10.0),
        "steep": Columns(4, 4, 4.0, 13, 13, 10.0),
    }
    found = {"long": np.ones(24), "steep": np.array([4.0, *[2.0] * 11])}
    expected = {"long": 2, "steep": 12}
    assert allocate(leaves, found, 140, 2, "share") == expected


def test_a_leaf_that_loses_columns_demands_no_more_than_are_left():
    params = {"a": jnp.zeros((64, 40)), "b": jnp.zeros((64, 40))}
    optimizer = lowrank_optax.adarankgrad(0.1, 12)
    grads = random_like({"a": (64, 40), "b": (64, 40)})
    steep = jnp.exp(-jnp.arange(40.0))
    grads = {"a": grads["a"], "b": grads["b"] * steep}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    state = lowrank_optax.reallocate(state, bucket=4)
    for leaf in lowrank_optax.columns(state).values():
        assert max(leaf.rank, leaf.demand) <= leaf.capacity
