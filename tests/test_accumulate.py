"""Accumulation in the subspace: windows, wrappers, checkpoints, meshes, bad input."""

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
from lowrank_optax import accumulate
from tests.suite import ROWS, SMALL, gradients, types, zeros

pytestmark = pytest.mark.usefixtures("fast_compilation")

K = 3
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def compiled(row):
    """Returns the accumulation of a row and its jitted update."""
    accumulation = accumulate(row.build(0.1), K)
    return accumulation, jax.jit(accumulation.update)


def run(update, state, params, steps):
    history = []
    for step in steps:
        updates, state = update(gradients(params, step), state, params)
        history.append(updates)
    return history, state


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@every_row
def test_updates_come_once_in_a_window_and_sums_are_of_the_subspace(row):
    params = zeros(SMALL)
    accumulation, update = compiled(row)
    history, state = run(update, accumulation.init(params), params, range(2 * K))
    norms = [float(optax.tree.norm(updates)) for updates in history]
    assert [norm > 0 for norm in norms] == 2 * ([False] * (K - 1) + [True])
    in_subspace = state.sums["layers"].coordinates.shape
    # (2, 7, 5): 7 and 5 are primes, and every granularity is 1.
    assert in_subspace == (2, 5 if row.is_long else 7, row.rank)
    assert state.sums["bias"].shape == (5,)


@every_row
def test_add_and_finish_are_update_in_two_halves(row):
    params = zeros(SMALL)
    accumulation, update = compiled(row)
    expected, _ = run(update, accumulation.init(params), params, range(2 * K))

    @jax.jit
    def window(state, grads):
        def add(state, grads):
            return accumulation.add(grads, state), None

        state, _ = jax.lax.scan(add, state, grads)
        return accumulation.finish(state, params)

    state, actual = accumulation.init(params), []
    for start in (0, K):
        window_grads = [gradients(params, start + i) for i in range(K)]
        updates, state = window(
            state, jax.tree.map(lambda *x: jnp.stack(x), *window_grads)
        )
        actual.append(updates)
    for x, y in zip(actual, expected[K - 1 :: K], strict=True):
        # Another program: float32 rounding, enlarged by Adam's division.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), x, y
        )


@pytest.mark.parametrize("saved_at", [1, K + 2])
@every_row
def test_a_window_resumed_in_its_middle_continues_bit_for_bit(row, saved_at, tmp_path):
    params = zeros(SMALL)
    accumulation, update = compiled(row)
    _, state = run(update, accumulation.init(params), params, range(saved_at))
    assert int(state.micro_step) == saved_at % K > 0
    later = range(saved_at, saved_at + 3 * K)
    expected = run(update, state, params, later)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
    target = jax.eval_shape(accumulation.init, params)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", target)
    assert types(restored) == types(state)
    assert_same_bits(run(update, restored, params, later), expected)


@pytest.mark.parametrize("name", ["adamw", "not projected"])
def test_at_full_size_it_is_multi_steps(name):
    inner = optax.adamw(0.1) if name == "adamw" else lowrank_optax.vlorp(0.1, 64)
    params = zeros(SMALL)
    ours = accumulate(inner, K)
    theirs = optax.MultiSteps(inner, K).gradient_transformation()
    actual, _ = run(jax.jit(ours.update), ours.init(params), params, range(2 * K))
    expected, _ = run(jax.jit(theirs.update), theirs.init(params), params, range(2 * K))
    # They keep a running mean, this a sum: float32 rounding, divided by Adam.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        actual,
        expected,
    )


def test_weights_are_numbers_of_tokens():
    params = zeros(SMALL)
    optimizer = lowrank_optax.vlorp(0.1, 1, refresh=lowrank_optax.every(2))
    weights = [1.0, 5.0, 2.0]
    accumulation = accumulate(optimizer, K)
    state = accumulation.init(params)
    update = jax.jit(accumulation.update)
    micro_batches = [gradients(params, i) for i in range(K)]
    for grads, weight in zip(micro_batches, weights, strict=True):
        updates, state = update(grads, state, params, weight=weight)
    mean = jax.tree.map(
        lambda *x: sum(w * g for w, g in zip(weights, x, strict=True)) / sum(weights),
        *micro_batches,
    )
    expected, _ = jax.jit(optimizer.update)(mean, optimizer.init(params), params)
    # Projections of the sum and sums of projections: float32 rounding, through Adam.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
        updates,
        expected,
    )


def test_the_clipped_norm_is_that_of_the_projected_mean():
    params = {"w": jnp.zeros((8, 6)), "b": jnp.zeros(6)}
    low_rank = lowrank_optax.scale_by_low_rank(
        optax.identity(), 2, basis=lowrank_optax.exact_svd()
    )
    accumulation = accumulate(optax.chain(optax.clip_by_global_norm(0.5), low_rank), 2)
    state = accumulation.init(params)
    for step in range(2):
        grads = gradients(params, step)
        updates, state = jax.jit(accumulation.update)(grads, state, params)
    # An orthonormal basis lifts without changing the norm, so the update shows it.
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)
    basis = state.inner_state[1].subspaces["w"].basis
    mean = jax.tree.map(
        lambda x, y: (x + y) / 2, *(gradients(params, i) for i in (0, 1))
    )
    projected = {"w": mean["w"] @ basis, "b": mean["b"]}
    factor = 0.5 / optax.tree.norm(projected)
    np.testing.assert_allclose(updates["b"], factor * mean["b"], rtol=1e-4)


INSIDE = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "partition": lambda tx: optax.partition(
        {"low rank": tx, "rest": optax.adamw(0.1, weight_decay=0.0)},
        {"layers": "low rank", "bias": "rest"},
    ),
    "masked": lambda tx: optax.masked(tx, {"layers": True, "bias": False}),
}


@pytest.mark.parametrize("wrapper", INSIDE)
@pytest.mark.parametrize("name", ["galore", "projfactor"])
def test_low_rank_transformations_are_found_however_deep_they_are(name, wrapper):
    row = next(row for row in ROWS if row.name == name)
    params = zeros(SMALL)
    bare, update = compiled(row)
    expected, _ = run(update, bare.init(params), params, range(2 * K))
    wrapped = accumulate(INSIDE[wrapper](row.build(0.1)), K)
    state = wrapped.init(params)
    assert state.sums["layers"].coordinates.shape == (2, 7, row.rank)
    actual, _ = run(jax.jit(wrapped.update), state, params, range(2 * K))
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x["layers"], y["layers"], rtol=2e-3, atol=2e-5)


def test_two_methods_side_by_side_have_their_own_leaves():
    params = zeros({"a": (9, 6), "b": (9, 6)})
    tx = optax.partition(
        {"a": lowrank_optax.galore(0.1, 2), "b": lowrank_optax.vlorp(0.1, 3, 1)},
        {"a": "a", "b": "b"},
    )
    accumulation = accumulate(tx, K)
    state = accumulation.init(params)
    shapes = {name: total.coordinates.shape for name, total in state.sums.items()}
    assert shapes == {"a": (9, 2), "b": (9, 3)}
    updates, _ = run(jax.jit(accumulation.update), state, params, range(K))
    assert all(float(jnp.linalg.norm(x)) > 0 for x in updates[-1].values())


def test_two_methods_on_one_leaf_are_refused():
    params = zeros({"a": (9, 6)})
    low_rank = lowrank_optax.scale_by_low_rank(optax.identity(), 2)
    accumulation = accumulate(optax.chain(low_rank, low_rank), K)
    with pytest.raises(ValueError, match=r"\['a'\]: two low-rank .* project it"):
        accumulation.init(params)


@pytest.mark.parametrize("every_k", [0, -1, 2.0, True])
def test_every_k_below_one_is_refused(every_k):
    with pytest.raises(ValueError, match="every_k must be an int >= 1, got"):
        accumulate(optax.sgd(0.1), every_k)


def test_a_gradient_of_another_shape_names_its_leaf():
    params = {"b": jnp.zeros(6)}
    accumulation = accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"\['b'\]: a gradient of shape \(5,\)"):
        accumulation.add({"b": jnp.zeros(5)}, accumulation.init(params))


def test_a_window_of_one_is_the_optimizer():
    row = ROWS[1]
    params = zeros(SMALL)
    single = accumulate(row.build(0.1), 1)
    actual, _ = run(jax.jit(single.update), single.init(params), params, range(5))
    optimizer = row.build(0.1)
    expected, _ = run(
        jax.jit(optimizer.update), optimizer.init(params), params, range(5)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5),
        actual,
        expected,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_are_float32_and_updates_of_the_gradients_dtype(dtype):
    params = zeros(SMALL, dtype)
    accumulation = accumulate(lowrank_optax.projfactor(0.1, 1), K)
    state = accumulation.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.sums)} == {jnp.dtype(jnp.float32)}
    updates, after = jax.eval_shape(accumulation.update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert types(after) == types(state)


def test_a_spoiled_micro_batch_spoils_its_window_and_no_other():
    params = zeros(SMALL)
    accumulation = accumulate(lowrank_optax.vlorp(0.1, 1), 2)
    update, state = jax.jit(accumulation.update), accumulation.init(params)
    spoiled = optax.tree.full_like(params, jnp.nan)
    _, state = update(spoiled, state, params)
    state = state._replace(micro_step=jnp.zeros_like(state.micro_step))
    history, _ = run(update, state, params, range(2))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(history))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize(
    "mode", [AxisType.Auto, AxisType.Explicit], ids=lambda mode: mode.name.lower()
)
@pytest.mark.parametrize("name", ["galore", "projfactor"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=str)
def test_on_a_mesh_values_are_those_of_one_device(name, mode, spec):
    methods = {
        "galore": lambda: lowrank_optax.galore(0.1, 4, update_proj_gap=2),
        "projfactor": lambda: lowrank_optax.projfactor(
            0.1, 4, 2, refresh=lowrank_optax.every(2)
        ),
    }
    accumulation = accumulate(methods[name](), 2)
    params = {"w": jnp.zeros((64, 48))}
    expected, _ = run(
        jax.jit(accumulation.update), accumulation.init(params), params, range(8)
    )
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        cut = {"w": jax.device_put(params["w"], sharding)}
        first = state = accumulation.init(cut)
        update = jax.jit(accumulation.update)
        for step in range(8):
            grads = {
                "w": jax.device_put(np.asarray(gradients(params, step)["w"]), sharding)
            }
            updates, state = update(grads, state, cut)
            # Sums in another order, enlarged by Adam's division.
            np.testing.assert_allclose(
                updates["w"], expected[step]["w"], rtol=1e-3, atol=1e-5
            )
        assert types(state) == types(first)


def test_projections_looks_through_an_accumulation():
    tx = lowrank_optax.galore(0.1, 2)
    params = zeros(SMALL)
    expected = lowrank_optax.projections(tx, params)
    assert expected["['layers']"].is_projected
    assert lowrank_optax.projections(accumulate(tx, K), params) == expected
