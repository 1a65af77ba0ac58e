"""Arrays cut and grown between steps: what follows, what stays, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import capacities, compact, like_saved, resize
from lowrank_optax.codes import bytes_of, shape_of
from tests.suite import gradients, run, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

CAPACITY, USED = 12, 5
SHAPES = {"w": (40, 24), "layers": (2, 20, 32), "bias": (24,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def adaptive(capacity=CAPACITY):
    """Rank as one gradient asks for it: 5 for those of :func:`low_rank`."""
    return lowrank_optax.adarankgrad(
        0.1,
        lowrank_optax.energy_rank(capacity, 1e-4, min_rank=2, smoothing=0.0),
        refresh=lowrank_optax.every(4, stagger=False),
    )


OPTIMIZERS = {
    "plain": adaptive,
    "8 bits": lambda: lowrank_optax.low_bit(adaptive(), 8, 8, min_size=1, block=16),
    "basis 4": lambda: lowrank_optax.low_bit(adaptive(), 8, 4, min_size=1, block=16),
    "accumulate": lambda: lowrank_optax.accumulate(adaptive(), 2),
    "partition": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"a": adaptive(), "b": optax.adam(0.1)},
            {"w": "a", "layers": "a", "bias": "b"},
        ),
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# For what compiles several updates.
some_optimizers = pytest.mark.parametrize("name", ["plain", "basis 4", "accumulate"])


def low_rank(step):
    """Gradients of rank 5."""
    rng = np.random.default_rng(step)

    def of(shape):
        if len(shape) == 1:
            return rng.normal(size=shape)
        left = rng.normal(size=(*shape[:-1], USED))
        return left @ rng.normal(size=(*shape[:-2], USED, shape[-1]))

    return {name: jnp.asarray(of(shape), jnp.float32) for name, shape in SHAPES.items()}


def advance(update, state, steps):
    history = []
    for step in steps:
        updates, state = update(low_rank(step), state, PARAMS)
        history.append(updates)
    return history, state


@functools.cache
def used(name):
    """Returns optimizer, jitted update, and its state after two updates."""
    optimizer = OPTIMIZERS[name]()
    update = jax.jit(optimizer.update)
    return (
        optimizer,
        update,
        advance(update, jax.jit(optimizer.init)(PARAMS), range(2))[1],
    )


@some_optimizers
def test_a_compacted_state_is_smaller_and_makes_the_same_updates(name):
    _, update, state = used(name)
    assert capacities(state) == {"['layers']": CAPACITY, "['w']": CAPACITY}
    smaller = compact(state, bucket=6)
    assert capacities(smaller) == {"['layers']": 6, "['w']": 6}
    assert bytes_of(smaller) < 0.75 * bytes_of(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        lowrank_optax.ranks(smaller),
        lowrank_optax.ranks(state),
    )
    # Up to the next refresh, whose sketch has other columns. Cut columns were zero:
    # other shapes of products only.
    expected, _ = advance(update, state, range(2, 4))
    actual, after = advance(update, smaller, range(2, 4))
    assert types(after) == types(smaller)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        actual,
        expected,
    )
    history, after = advance(update, after, range(4, 14))
    assert types(after) == types(smaller)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(history))


@every_optimizer
def test_what_is_cut_and_grown_again_is_the_same_where_it_was(name):
    _, _, state = used(name)
    again = resize(resize(state, 6), CAPACITY)
    assert types(again) == types(state)
    small, same = resize(state, 6), resize(again, 6)
    jax.tree.map(np.testing.assert_array_equal, same, small)


@some_optimizers
def test_a_grown_state_fills_its_columns_at_the_next_refresh(name):
    optimizer, update, _ = used(name)
    state = resize(resize(jax.jit(optimizer.init)(PARAMS), CAPACITY), 16)
    rng = np.random.default_rng(0)
    full = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS
    )
    _, state = update(full, state, PARAMS)
    # Sixteen of 20 to 24 directions: what noise asks for.
    assert all(np.all(rank == 16) for rank in lowrank_optax.ranks(state).values())


def test_leaves_are_resized_one_by_one_and_the_others_are_the_same_arrays():
    _, _, state = used("plain")
    smaller = resize(state, {"['w']": 7})
    assert capacities(smaller) == {"['layers']": CAPACITY, "['w']": 7}
    before, after = state[0], smaller[0]
    assert after.subspaces["layers"].basis is before.subspaces["layers"].basis
    assert after.inner_state.mu["layers"] is before.inner_state.mu["layers"]
    assert after.inner_state.mu["bias"] is before.inner_state.mu["bias"]
    assert after.inner_state.nu["w"].shape == (40, 7)


def test_nothing_to_free_is_the_state_itself():
    _, _, state = used("plain")
    assert compact(state, bucket=CAPACITY) is state
    assert compact(state, bucket=6, min_saving=0.99) is state
    fixed = lowrank_optax.galore(0.1, 4).init(PARAMS)
    assert compact(fixed, bucket=1) is fixed


def test_a_peak_is_kept():
    _, _, state = used("plain")
    smaller = compact(state, bucket=1, peaks={"['w']": 9})
    assert capacities(smaller) == {"['layers']": USED, "['w']": 9}


def test_numbers_of_numpy_are_numbers():
    """The largest rank of lowrank_optax.ranks is one."""
    _, _, state = used("plain")
    peaks = {k: x.max() + 4 for k, x in lowrank_optax.ranks(state).items()}
    assert set(capacities(compact(state, bucket=1, peaks=peaks)).values()) == {USED + 4}
    eight = dict.fromkeys(capacities(state), 8)
    assert capacities(resize(state, np.int32(8))) == eight
    assert capacities(resize(state, {k: np.int64(8) for k in eight})) == eight


def test_a_demand_above_the_rank_is_kept():
    """Smoothed demand rounds up to the rank, but a minimum may be above it."""
    _, _, state = used("plain")
    leaf = lowrank_optax.columns(state)["['w']"]
    assert (leaf.capacity, leaf.rank, leaf.side, leaf.rows) == (CAPACITY, USED, 24, 40)
    assert leaf.bytes_per_column == 4 * (24 + 40 + 40)
    assert leaf._replace(demand=8.2).wanted(2) == 10


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (USED - 1, r"\['layers'\]: 4 columns are below the rank in use, 5"),
        ({"['w']": 3}, r"\['w'\]: 3 columns are below the rank in use, 5"),
        ({"['w']": 0}, "columns must be an int >= 1, got 0"),
        ({"['w']": 25}, "1 to 24 columns, not 25"),
        ({"['w']": 2.0}, "columns must be an int >= 1, got 2.0"),
        ({"['bias']": 4}, r"\['bias'\] has no stored basis .* \['layers'\], \['w'\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ranks, message):
    _, _, state = used("plain")
    with pytest.raises(ValueError, match=message):
        resize(state, ranks)


SIDES = {"short": (64, 16), "long": (64, 16), "stack": (2, 9, 30)}


@pytest.mark.parametrize("name", SIDES)
def test_every_count_that_is_taken_can_be_refreshed(name):
    """With the most columns a basis holds the whole gradient, and the update is it."""
    shape, most = SIDES[name], min(SIDES[name][-2:])
    tx = lowrank_optax.scale_by_low_rank(
        optax.trace(0.0),
        rank=4,
        basis=lowrank_optax.exact_svd(),
        side="long" if name == "long" else "short",
    )
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=f"has 1 to {most} columns, not {most + 1}"):
        resize(state, most + 1)
    state = resize(state, most)
    grads = gradients(params, 0)
    updates, state = jax.jit(tx.update)(grads, state)
    assert set(capacities(state).values()) == {most}
    # Two products in float32 with orthonormal columns.
    np.testing.assert_allclose(updates["w"], grads["w"], atol=1e-5)


def without_moments(name):
    inner = {"identity": optax.identity(), "sign": optax.scale_by_sign()}[name]
    rank = lowrank_optax.energy_rank(12, 1e-4, min_rank=2, smoothing=0.0)
    refresh = lowrank_optax.every(4, stagger=False)
    return lowrank_optax.scale_by_low_rank(inner, rank, refresh=refresh, side="long")


@pytest.mark.parametrize("name", ["identity", "sign"])
def test_states_without_moments_are_measured_and_cut(name):
    tx = without_moments(name)
    params = {"w": PARAMS["w"]}
    _, state = jax.jit(tx.update)({"w": low_rank(0)["w"]}, tx.init(params))
    leaf = lowrank_optax.columns(state)["['w']"]
    assert (leaf.capacity, leaf.rank, leaf.side, leaf.rows) == (12, USED, 40, None)
    assert leaf.bytes_per_column == 4 * 40
    smaller = compact(state, bucket=1)
    assert capacities(smaller) == {"['w']": USED}
    expected, _ = jax.jit(tx.update)({"w": low_rank(1)["w"]}, state)
    actual, _ = jax.jit(tx.update)({"w": low_rank(1)["w"]}, smaller)
    if name == "identity":
        # Other shapes of products.
        np.testing.assert_allclose(actual["w"], expected["w"], atol=1e-5)
    with pytest.raises(ValueError, match=r"\['w'\]: there is no moment .* moments="):
        lowrank_optax.reallocate(state)


def test_columns_that_no_array_refuses_are_refused_by_the_next_update():
    tx = without_moments("identity")
    params = {"w": PARAMS["w"]}
    state = resize(tx.init(params), 30)
    message = r"\['w'\]: .* of shape \(40, 24\) .* 24 columns, not 30; resize"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, params, state)


def test_a_random_basis_has_no_columns_to_free():
    state = lowrank_optax.vlorp(0.1, 2, 2).init(PARAMS)
    assert capacities(state) == {}
    assert compact(state) is state
    with pytest.raises(ValueError, match="has no stored basis"):
        resize(state, {"['w']": 1})


@pytest.mark.parametrize("bucket", [0, 2.5, True])
def test_bucket_is_checked(bucket):
    with pytest.raises(ValueError, match="bucket must be an int >= 1"):
        compact(used("plain")[2], bucket=bucket)


@every_optimizer
def test_shapes_are_resized_as_arrays_are(name):
    optimizer, _, _ = used(name)
    shapes = jax.eval_shape(optimizer.init, PARAMS)
    for columns in (7, 13):
        arrays = resize(jax.jit(optimizer.init)(PARAMS), max(columns, CAPACITY))
        expected = jax.tree.map(
            lambda x: (x.shape, x.dtype), resize(shapes, max(columns, CAPACITY))
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), arrays) == expected
    smaller = resize(shapes, 7)
    assert jax.tree.structure(smaller) == jax.tree.structure(shapes)
    assert set(capacities(smaller).values()) == {7}


@some_optimizers
def test_orbax_restores_a_compacted_state_with_the_checkpoint_and_the_optimizer(
    name, tmp_path
):
    optimizer, update, state = used(name)
    state = compact(state, bucket=6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        first = jax.eval_shape(optimizer.init, PARAMS)
        saved = checkpointer.metadata(tmp_path / "state").item_metadata.tree
        restored = checkpointer.restore(tmp_path / "state", like_saved(first, saved))
    assert types(restored) == types(state)
    expected = advance(update, state, range(2, 12))
    actual = advance(update, restored, range(2, 12))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_state_saved_otherwise_is_refused_by_name():
    plain = jax.eval_shape(OPTIMIZERS["plain"]().init, PARAMS)
    coded = jax.eval_shape(OPTIMIZERS["8 bits"]().init, PARAMS)
    with pytest.raises(ValueError, match=r"basis.*codes.* not there .* basis_bits"):
        like_saved(coded, plain)
    with pytest.raises(ValueError, match="not there"):
        like_saved(plain, coded)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize(
    ("name", "mode"), [("plain", AxisType.Explicit), ("8 bits", AxisType.Auto)]
)
def test_arrays_of_a_mesh_stay_sharded(name, mode):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    params = {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh, P("x", None)))}
    grads = {"w": jax.device_put(low_rank(0)["w"], params["w"].sharding)}
    optimizer = OPTIMIZERS[name]()
    update = jax.jit(optimizer.update)
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        _, state = update(grads, state, params)
        smaller = compact(state, bucket=6)
        assert capacities(smaller) == {"['w']": 6}
        assert jax.tree.map(lambda x: x.sharding, smaller) == jax.tree.map(
            lambda x: x.sharding, state
        )
        _, after = update(grads, smaller, params)
    mu = after[0].inner_state.mu["w"]
    assert shape_of(mu) == (40, 6)
    assert len(jax.tree.leaves(mu)[0].sharding.device_set) == 8
    shapes = [x.shape for x in jax.tree.leaves(after)]
    assert shapes == [x.shape for x in jax.tree.leaves(smaller)]


def test_adam_states_beside_are_left_alone():
    """A momentum at full size whose last axis has as many columns as the capacity."""
    params = {"w": jnp.zeros((40, 24)), "narrow": jnp.zeros((40, CAPACITY))}
    optimizer = optax.chain(optax.trace(0.9), adaptive())
    state = optimizer.init(params)
    _, state = run(optimizer.update, state, params, range(1))
    smaller = resize(state, {"['w']": CAPACITY + 2})
    assert smaller[0].trace["narrow"].shape == (40, CAPACITY)
    assert smaller[1][0].inner_state.mu["narrow"].shape == (40, CAPACITY)


def test_arrays_of_numpy_are_cut_and_grown_too():
    """As pickle and flax.serialization restore them."""
    _, _, state = used("plain")
    host = jax.device_get(state)
    for change in (lambda x: compact(x, 2), lambda x: resize(x, CAPACITY + 4)):
        expected, found = change(state), change(host)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert capacities(found) != capacities(state)


def test_what_a_leaf_needs_is_that_of_its_neediest_matrix():
    params = {"layers": jnp.zeros((2, 24, 40))}
    state = lowrank_optax.adarankgrad(0.1, 8).init(params)
    slot = state[0].subspaces["layers"]
    slot = slot._replace(rank=jnp.array([3, 7]), demand=jnp.array([6.5, 2.5]))
    state = (state[0]._replace(subspaces={"layers": slot}), *state[1:])
    (found,) = lowrank_optax.columns(state).values()
    assert (found.rank, found.demand) == (7, 6.5)
