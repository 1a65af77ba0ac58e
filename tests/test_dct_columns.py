"""Bases of columns of the cosine transform, which the state holds as numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import dct_columns, subspaces
from lowrank_optax.rules.dct_columns import cosine_columns
from tests import references
from tests.suite import random_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 4
SHAPES = {"w": (20, 14), "layers": (2, 9, 12), "bias": (5,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def grads(seed):
    return random_like(SHAPES, seed)


def chosen(matrix, rank=RANK):
    """Returns the numbers of the columns with the most energy, in float64."""
    matrix = np.asarray(matrix, np.float64)
    energies = np.sum((matrix @ references.dct_matrix(matrix.shape[-1])) ** 2, axis=0)
    return np.argsort(-energies)[:rank]


def scaled(**parts):
    options = {"rank": RANK, "refresh": lowrank_optax.every(2, stagger=False), **parts}
    inner = optax.scale_by_adam()
    return lowrank_optax.scale_by_low_rank(inner, basis=dct_columns(), **options)


@functools.cache
def after(steps):
    """Returns the state of :func:`scaled` after these gradients."""
    tx = scaled()
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for seed in range(steps):
        _, state = update(grads(seed), state, PARAMS)
    return state


@pytest.mark.parametrize("length", [1, 2, 7, 600, 2**15 + 1])
def test_columns_are_those_of_the_formula(length):
    numbers = np.unique(np.linspace(0, length - 1, 40).astype(np.int32))[None]
    found = dct_columns().columns(jnp.asarray(numbers), length, jnp.float32)
    angles = np.pi * (2 * np.arange(length)[:, None] + 1) * numbers / (2 * length)
    expected = np.cos(angles) * np.sqrt(np.where(numbers > 0, 2, 1) / length)
    # Of a column's norm, 1; float32 rounding of an angle, and of its cosine.
    np.testing.assert_allclose(found, expected, atol=1e-6 * min(1, 9 / length**0.5))


def test_a_negative_number_is_a_zero_column():
    found = dct_columns().columns(jnp.asarray([[2, -1]]), 8, jnp.float32)
    assert np.any(found[:, 0])
    assert not np.any(found[:, 1])


# More columns than energies are computed at a time for.
@pytest.mark.parametrize("side", [14, 1100])
def test_the_columns_with_the_most_energy_are_chosen(side):
    matrix = np.random.default_rng(side).normal(size=(3, 9, side)).astype(np.float32)
    found = dct_columns().numbers(jnp.asarray(matrix), RANK)
    assert (found.shape, found.dtype) == ((3, 1, RANK), jnp.int32)
    expected = [chosen(one)[None] for one in matrix]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", ["short", "long"])
def test_updates_are_those_of_the_reference(side):
    tx = scaled(side=side)
    state, history, update = tx.init(PARAMS), [], jax.jit(tx.update)
    for seed in range(5):
        updates, state = update(grads(seed), state, PARAMS)
        history.append(updates)
    for name, at in (("w", ()), ("layers", (0,)), ("layers", (1,))):
        expected, _ = references.low_rank(
            [np.asarray(grads(seed)[name][at], np.float64) for seed in range(5)],
            capacity=RANK,
            inner=references.adam(),
            basis=lambda a, p, i: references.dct_columns(a, RANK),
            rank=references.fixed_rank(RANK),
            schedule=references.Every(2),
            rebase=references.rebase("square"),
            side=side,
        )
        found = [updates[name][at] for updates in history]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_moments_of_a_column_that_stays_stay():
    before = after(2)
    tx = scaled()
    _, new = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, PARAMS), before, PARAMS)
    # No basis of zeros, so that another gradient gives it.
    old = np.asarray(before.subspaces["w"].basis)[0]
    np.testing.assert_array_equal(new.subspaces["w"].basis[0], old)
    _, new = jax.jit(tx.update)(grads(2), before, PARAMS)
    numbers = np.asarray(new.subspaces["w"].basis)[0]
    kept = [
        (i, j)
        for i, j in itertools.product(range(RANK), repeat=2)
        if old[i] == numbers[j]
    ]
    assert 0 < len(kept) < RANK
    q = references.dct_matrix(14)
    for i, j in kept:
        mean = before.inner_state.mu["w"][:, i] * 0.9
        mean += 0.1 * np.asarray(grads(2)["w"]) @ q[:, numbers[j]]
        np.testing.assert_allclose(new.inner_state.mu["w"][:, j], mean, atol=1e-6)


@pytest.mark.parametrize("entry", [0.0, np.nan])
def test_what_has_no_basis_keeps_the_numbers(entry):
    tx, state = scaled(), after(2)
    update = jax.jit(tx.update)
    bad = grads(9)
    bad["layers"] = bad["layers"].at[1].set(entry)
    first = update(bad, tx.init(PARAMS), PARAMS)[1].subspaces["layers"]
    np.testing.assert_array_equal(first.basis[1], -np.ones((1, RANK)))
    later = update(bad, state, PARAMS)[1].subspaces["layers"]
    old = state.subspaces["layers"]
    np.testing.assert_array_equal(later.basis[1], old.basis[1])
    np.testing.assert_array_equal(later.basis[0, 0], chosen(bad["layers"][0].T))
    np.testing.assert_array_equal(later.failures, [0, 1])


def test_a_state_has_four_bytes_for_each_column():
    slots = jax.eval_shape(scaled().init, PARAMS).subspaces
    assert slots["layers"].basis.shape == (2, 1, RANK)
    assert slots["layers"].basis.dtype == jnp.int32
    plan = lowrank_optax.memory_plan(scaled(), PARAMS)
    assert plan.state_bytes["basis"] == 4 * RANK * 3


def test_a_rank_by_energy_ends_the_numbers():
    q = references.dct_matrix(14)
    columns = q[:, [3, 0, 8]] * [3.0, 2.0, 1.0]
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 3)))[0] @ columns.T
    rule = lowrank_optax.energy_rank(RANK, 0.1, min_rank=1, smoothing=0.0)
    tx = lowrank_optax.adarankgrad(1e-2, rule, basis=dct_columns())
    gradient = {"w": jnp.asarray(matrix, jnp.float32)}
    _, state = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
    slot = subspaces(state)["['w']"]
    # Of energies 9, 4 and 1 the last is below a tenth.
    np.testing.assert_array_equal(slot.basis, [[3, 0, -1, -1]])
    assert slot.rank == 2
    small = lowrank_optax.compact(state, 1)
    assert lowrank_optax.capacities(small) == {"['w']": 2}
    np.testing.assert_array_equal(subspaces(small)["['w']"].basis, [[3, 0]])
    grown = lowrank_optax.resize(small, 6)
    np.testing.assert_array_equal(
        subspaces(grown)["['w']"].basis, [[3, 0, -1, -1, -1, -1]]
    )
    again = jax.jit(tx.update)(gradient, grown, gradient)[0]["w"]
    expected = jax.jit(tx.update)(gradient, state, gradient)[0]["w"]
    np.testing.assert_allclose(again, expected, atol=1e-6)


def test_the_side_that_numbers_do_not_show_is_not_exceeded():
    state = after(2)
    found = lowrank_optax.columns(state)["['w']"]
    assert RANK <= found.side == np.max(state.subspaces["w"].basis) + 1 <= 14
    assert found.most <= 14
    spread = lowrank_optax.reallocate(state, 10**6, bucket=1)
    assert max(lowrank_optax.capacities(spread).values()) > RANK
    jax.eval_shape(scaled().update, PARAMS, spread, PARAMS)
    # Of the rows alone a state knows that 20 are there.
    with pytest.raises(ValueError, match="has 1 to 20 columns, not 21"):
        lowrank_optax.resize(state, {"['w']": 21})
    with pytest.raises(ValueError, match="at most 14 columns, not 15"):
        jax.eval_shape(
            scaled().update, PARAMS, lowrank_optax.resize(state, {"['w']": 15}), PARAMS
        )


def test_another_rule_does_not_take_the_numbers_for_columns():
    floats = lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), RANK)
    for tx, other in ((floats, scaled()), (scaled(), floats)):
        with pytest.raises(ValueError, match="made for other parameters, basis"):
            jax.eval_shape(tx.update, PARAMS, other.init(PARAMS), PARAMS)


def test_numbers_are_never_coded():
    tx = lowrank_optax.low_bit(scaled(), 8, 4, min_size=1)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(grads(0), state, PARAMS)
    slots = state.subspaces
    np.testing.assert_array_equal(slots["w"].basis[0], chosen(grads(0)["w"]))
    assert state.inner_state.mu["w"].codes.dtype == jnp.int8


METHODS = {
    "fira": lowrank_optax.fira,
    "galore": lowrank_optax.galore,
    "low_rank_muon": lowrank_optax.low_rank_muon,
    "projfactor": functools.partial(lowrank_optax.projfactor, granularity=1),
    "sumo": lowrank_optax.sumo,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_move_inside_the_columns(name):
    tx = METHODS[name](0.1, RANK, basis=dct_columns())
    updates, state = jax.jit(tx.update)(grads(0), tx.init(PARAMS), PARAMS)
    basis = np.asarray(subspaces(state)["['w']"].basis)[0]
    np.testing.assert_array_equal(basis, chosen(grads(0)["w"]))
    assert np.any(updates["w"])
    if name in ("galore", "sumo"):
        q = references.dct_matrix(14)[:, basis]
        np.testing.assert_allclose(updates["w"] @ q @ q.T, updates["w"], atol=1e-6)


def test_a_finer_granularity_chooses_columns_of_the_pieces():
    tx = scaled(granularity=2)
    state = jax.jit(tx.update)(grads(0), tx.init(PARAMS), PARAMS)[1]
    pieces = np.asarray(grads(0)["w"]).reshape(40, 7)
    np.testing.assert_array_equal(state.subspaces["w"].basis[0], chosen(pieces))


def test_micro_batches_are_added_in_the_columns_of_the_first():
    tx = lowrank_optax.accumulate(scaled(), 2)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for seed in (0, 1):
        _, state = update(grads(seed), state, PARAMS)
    slot = subspaces(state)["['w']"]
    np.testing.assert_array_equal(slot.basis[0], chosen(grads(0)["w"]))
    assert slot.refreshes == 1


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["up"])
    return jnp.mean(jnp.sin(hidden @ params["down"]) ** 2)


def test_gradients_inside_the_subspace_train_as_full_ones():
    params = random_like({"up": (8, 20), "down": (20, 6)})
    batches = [random_like({"x": (12, 8)}, seed)["x"] for seed in range(5)]
    optimizer = lowrank_optax.galore(1e-2, RANK, 2, basis=dct_columns())
    found = {}
    for kind in ("full", "subspace"):
        step = lowrank_optax.train_step(
            loss_fn, optimizer, gradients=kind, refresh="full"
        )
        own, state = jax.tree.map(jnp.copy, params), step.init(params)
        for batch in batches:
            own, state, _ = step(own, state, batch)
        found[kind] = own, subspaces(state.optimizer)["['up']"].basis
    # Small entries of Adam's second moment turn roundings into more.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), *found.values()
    )


def test_a_sketch_of_all_rows_gives_the_columns_of_the_gradient():
    params = random_like({"up": (8, 20)})
    tx = scaled(side="long")
    state = tx.init(params)
    function = lowrank_optax.subspace_value_and_grad(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["up"]) ** 2), tx
    )
    batch = random_like({"x": (12, 8)}, 1)["x"]
    *_, sketches = jax.jit(function.sketching(oversample=RANK))(params, state, batch)
    state = function.renewed(params, state, sketches)
    full = jax.grad(lambda p: jnp.mean(jnp.tanh(batch @ p["up"]) ** 2))(params)
    # Eight rows of eight, and an orthogonal test matrix.
    np.testing.assert_array_equal(state.subspaces["up"].basis[0], chosen(full["up"]))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_numbers_are_whole_on_every_device(mode):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(mode,) * 2)
    shapes = {"w": P("x", "y"), "layers": P(None, "x", "y"), "bias": P()}
    put = {name: NamedSharding(mesh, spec) for name, spec in shapes.items()}
    shapes = {"w": (20, 14), "layers": (2, 10, 12), "bias": (5,)}
    gradients = random_like(shapes, 3)
    tx = scaled()
    update = jax.jit(tx.update)
    expected, alone = update(gradients, tx.init(gradients), gradients)
    with jax.set_mesh(mesh):
        cut = jax.tree.map(jax.device_put, gradients, put)
        state = tx.init(cut)
        updates, new = update(cut, state, cut)
    for name in ("w", "layers"):
        basis = new.subspaces[name].basis
        assert basis.sharding.is_fully_replicated
        np.testing.assert_array_equal(basis, alone.subspaces[name].basis)
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-5)


def test_a_checkpoint_keeps_the_numbers(tmp_path):
    state = after(2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(scaled().init, PARAMS)
        found = checkpointer.restore(tmp_path / "state", like)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_bytes_are_spread_anew_without_a_loss_of_columns():
    """Low numbers show a short side, which must not cut the leaf."""
    params = {"low": jnp.zeros((40, 24)), "any": jnp.zeros((40, 24))}
    tx = lowrank_optax.low_rank_muon(0.1, rank=8, basis=dct_columns())
    state = tx.init(params)
    before = lowrank_optax.capacities(state)
    assert lowrank_optax.capacities(lowrank_optax.reallocate(state, bucket=4)) == before
    low = dct_columns().columns(jnp.arange(8)[None], 24, jnp.float32)
    rng = np.random.default_rng(0)
    normal = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)
    _, state = tx.update({"low": normal[:, :8] @ low.T, "any": normal}, state, params)
    assert set(np.ravel(subspaces(state)["['low']"].basis).tolist()) == set(range(8))
    spread = lowrank_optax.capacities(lowrank_optax.reallocate(state, bucket=4))
    assert spread["['low']"] >= 8
    assert sum(spread.values()) == sum(before.values())


def test_columns_of_a_side_beyond_the_products_of_32_bits_are_those_of_the_formula():
    """2 length^2 exceeds 2^32: the last rows of high columns show it."""

    length, numbers = 70_001, np.array([[1, 30_001, 47_852, 70_000]])
    found = cosine_columns(jnp.asarray(numbers), length, jnp.float32)
    angles = np.pi * (2 * np.arange(length)[:, None] + 1) * numbers / (2 * length)
    expected = np.cos(angles) * np.sqrt(2 / length)
    np.testing.assert_allclose(found, expected, atol=1e-6 * 9 / length**0.5)
