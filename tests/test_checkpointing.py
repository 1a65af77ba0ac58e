"""Orbax saves and restores a state within a refresh period, to the last bit."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.suite import ROWS, SMALL, compiled, gradients, run, types, zeros

pytestmark = pytest.mark.usefixtures("fast_compilation")

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

SAVED_AT, RESUMED = 5, 20


def _with_standard_checkpointer(path, state, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
    # Another one, so that nothing is remembered.
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def _with_pytree_checkpointer(path, state, target):
    ocp.PyTreeCheckpointer().save(path, state)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.PyTreeCheckpointer().restore(
        path, item=target, restore_args=restore_args
    )


ROUND_TRIPS = {
    "standard": _with_standard_checkpointer,
    "pytree": _with_pytree_checkpointer,
}
every_round_trip = pytest.mark.parametrize("round_trip", ROUND_TRIPS)


def _assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@every_round_trip
@every_row
def test_the_updates_after_a_restored_state_are_bitwise_the_same(
    row, round_trip, tmp_path
):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    _, state = run(update, optimizer.init(params), params, range(SAVED_AT))
    later = range(SAVED_AT, SAVED_AT + RESUMED)
    expected = run(update, state, params, later)

    # The target is shapes alone: whoever resumes has no state yet.
    target = jax.eval_shape(optimizer.init, params)
    restored = ROUND_TRIPS[round_trip](tmp_path / "state", state, target)

    assert types(restored) == types(state)
    _assert_same_bits(restored, state)
    _assert_same_bits(run(update, restored, params, later), expected)


@every_row
def test_the_state_is_saved_between_two_refreshes(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    _, state = run(update, optimizer.init(params), params, range(SAVED_AT))
    _, following = run(update, state, params, range(SAVED_AT, SAVED_AT + 1))
    _, last = run(update, state, params, range(SAVED_AT, SAVED_AT + RESUMED))
    saved, following, last = (
        x[0].subspaces["layers"].refreshes for x in (state, following, last)
    )
    assert np.all(saved >= 2)
    assert np.all(following == saved)
    assert np.all(last >= saved + 3)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize(
    "mode", [AxisType.Auto, AxisType.Explicit], ids=lambda mode: mode.name.lower()
)
@every_round_trip
def test_a_sharded_state_is_restored_with_its_shardings(round_trip, mode, tmp_path):
    row = ROWS[0]
    optimizer = row.build(0.1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    sharding = NamedSharding(mesh, P(None, "x"))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(zeros({"w": (16, 8)})["w"], sharding)}

        def sharded_gradients(step):
            return jax.device_put(gradients(zeros({"w": (16, 8)}), step), sharding)

        update = jax.jit(optimizer.update)
        state, expected, actual = optimizer.init(params), [], []
        for step in range(SAVED_AT):
            _, state = update(sharded_gradients(step), state, params)
        restored = ROUND_TRIPS[round_trip](tmp_path / "state", state, _abstract(state))
        assert types(restored) == types(state)
        assert [x.sharding for x in jax.tree.leaves(restored)] == [
            x.sharding for x in jax.tree.leaves(state)
        ]
        for step in range(SAVED_AT, SAVED_AT + RESUMED):
            updates, state = update(sharded_gradients(step), state, params)
            expected.append(updates)
            updates, restored = update(sharded_gradients(step), restored, params)
            actual.append(updates)
    _assert_same_bits((actual, restored), (expected, state))


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
