"""Accumulation in the subspace: windows, wrappers, checkpoints, meshes, bad input."""

import copy
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
from tests.suite import ROWS, SMALL, gradients, random_like, types, zeros

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


def test_a_micro_batch_without_weight_counts_nothing_whatever_it_has():
    """A mean over no tokens is 0 / 0."""
    params = zeros(SMALL)
    accumulation = accumulate(lowrank_optax.vlorp(0.1, 1), 2)
    grads = gradients(params, 0)
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads)
    found = []
    for parts in ([(grads, 5.0)], [(spoiled, 0.0), (grads, 5.0)], [(grads, 5.0)] * 2):
        state = accumulation.init(params)
        for part, weight in parts:
            state = accumulation.add(part, state, weight, params)
        found.append(accumulation.finish(state, params)[0])
    assert_same_bits(found[1], found[0])
    assert float(optax.tree.norm(found[0])) > 0


def test_a_window_without_micro_batches_has_a_mean_of_zero():
    params = zeros(SMALL)
    accumulation = accumulate(optax.sgd(1.0), 2)
    state = accumulation.init(params)
    for micro_batches, expected in ((2, 1.0), (0, 0.0), (1, 1.0)):
        grads = gradients(params, 0)
        for _ in range(micro_batches):
            state = accumulation.add(grads, state)
        updates, state = accumulation.finish(state, params)
        assert_same_bits(updates, jax.tree.map(lambda x: -expected * x, grads))  # noqa: B023


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
    low_rank = lowrank_optax.scale_by_low_rank(
        optax.identity(), 1, basis=lowrank_optax.gaussian()
    )
    accumulation = accumulate(low_rank, 2)
    update, state = jax.jit(accumulation.update), accumulation.init(params)
    spoiled = optax.tree.full_like(params, jnp.nan)
    _, state = update(spoiled, state, params)
    state = state._replace(micro_step=jnp.zeros_like(state.micro_step))
    history, _ = run(update, state, params, range(2))
    fresh, _ = run(update, accumulation.init(params), params, range(2))
    # Its weight is forgotten too.
    np.testing.assert_allclose(history[1]["bias"], fresh[1]["bias"], rtol=1e-6)
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


# --- windows in which a gradient is missing ------------------------------------------


def _plain(interval=1):
    """Projection and lift alone, by the leading right singular vectors."""
    return lowrank_optax.scale_by_low_rank(
        optax.identity(),
        RANK,
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(interval, stagger=False),
    )


RANK, STACK = 2, {"w": (3, 8, 5), "single": (6, 4)}
INSIDE_WINDOWS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "low_bit": lambda tx: lowrank_optax.low_bit(tx, 8, None, min_size=1),
}


def leading(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64))[2][:RANK].T


def projected_mean(micro_batches, basis):
    mean = np.mean([np.asarray(g, np.float64) for g in micro_batches], axis=0)
    return mean @ basis @ basis.T


@pytest.mark.parametrize("wrapper", INSIDE_WINDOWS)
def test_a_matrix_without_a_basis_gets_one_from_its_first_gradient(wrapper):
    """One of the stack has none in the first micro-batch, one in the first two."""
    params = zeros(STACK)
    accumulation = accumulate(INSIDE_WINDOWS[wrapper](_plain()), 4)
    update, state = jax.jit(accumulation.update), accumulation.init(params)
    starts = {"w": [0, 1, 2], "single": 1}
    found = []
    for step in range(4):
        grads = gradients(params, step)
        alive = {"w": jnp.asarray([step >= x for x in starts["w"]]), "single": step > 0}
        grads["w"] = grads["w"] * alive["w"][:, None, None]
        grads["single"] = grads["single"] * alive["single"]
        found.append(grads)
        updates, state = update(grads, state, params)
    # An SVD in float32, and sums of four.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for layer, start in enumerate(starts["w"]):
        layers = [grads["w"][layer] for grads in found]
        expected = projected_mean(layers, leading(layers[start]))
        close(updates["w"][layer], expected)
    singles = [grads["single"] for grads in found]
    close(updates["single"], projected_mean(singles, leading(singles[1])))
    subspaces = lowrank_optax.subspaces(state)
    assert all(np.all(x.refreshes == 1) for x in subspaces.values())
    assert not any(np.any(x.failures) for x in subspaces.values())


def test_a_basis_that_is_due_does_not_change_after_the_first_micro_batch():
    """Not where the first one has no gradient, and the old basis has to do."""
    params = zeros({"w": (8, 5)})
    accumulation = accumulate(_plain(interval=1), K)
    update, state = jax.jit(accumulation.update), accumulation.init(params)
    windows = [[gradients(params, K * i + j)["w"] for j in range(K)] for i in range(3)]
    windows[1][0] = params["w"]
    first, last = leading(windows[0][0]), leading(windows[2][0])
    for window, basis in zip(windows, (first, first, last), strict=True):
        for gradient in window:
            updates, state = update({"w": gradient}, state, params)
        expected = projected_mean(window, basis)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)
    subspace = lowrank_optax.subspaces(state)["['w']"]
    assert (int(subspace.refreshes), int(subspace.failures)) == (2, 0)


def test_failures_in_one_window_count_once():
    """A dead matrix asks as often as without micro-batches, one that wakes late too."""
    params = zeros({"w": (2, 6, 4)})
    accumulation, plain = accumulate(_plain(100), K), _plain(100)
    updates = [jax.jit(tx.update) for tx in (accumulation, plain)]
    windowed, state = accumulation.init(params), plain.init(params)
    # The second matrix is alive in the last micro-batch of each window from the fifth.
    for window in range(12):
        grads = {"w": gradients(params, window)["w"].at[0].set(0)}
        if window < 4:
            grads = {"w": grads["w"].at[1].set(0)}
        for micro_step in range(K):
            is_last = micro_step == K - 1
            now = jax.tree.map(lambda g, on=is_last: g * on, grads)
            _, windowed = updates[0](now, windowed, params)
        _, state = updates[1](grads, state)
        found, expected = (
            lowrank_optax.subspaces(x)["['w']"] for x in (windowed, state)
        )
        np.testing.assert_array_equal(found.failures, expected.failures)
        np.testing.assert_array_equal(found.refreshes, expected.refreshes)
    assert list(np.asarray(expected.refreshes)) == [0, 1]


def test_a_window_that_begins_with_projected_gradients_gets_its_basis_later():
    params = zeros({"w": (8, 5)})
    accumulation = accumulate(_plain(), 3)
    state = accumulation.init(params)
    # A gradient in a subspace that is not there yet is zero.
    narrow = {"w": lowrank_optax.Projected(jnp.zeros((8, RANK)))}
    full = [gradients(params, i) for i in range(2)]
    update = jax.jit(accumulation.update)
    for grads in (narrow, *full):
        updates, state = update(grads, state, params)
    expected = projected_mean(
        [params["w"], *(grads["w"] for grads in full)], leading(full[0]["w"])
    )
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)


def test_random_bases_are_drawn_at_the_first_micro_batch_alone():
    """A basis that has not been drawn yet is in use too, where nothing is renewed."""
    params = zeros({"w": (8, 5)})
    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(), RANK, basis=lowrank_optax.gaussian()
    )
    accumulation = accumulate(tx, 2)
    state = accumulation.init(params)
    state = accumulation.add(gradients(params, 0), state, refresh=False)
    state = accumulation.add(gradients(params, 1), state)
    assert int(lowrank_optax.subspaces(state)["['w']"].refreshes) == 0


# --- leaves of all kinds -------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_integer_leaves_are_treated_as_by_multi_steps(name):
    inner = {"adamw": optax.adamw(0.1), "galore": lowrank_optax.galore(0.1, 2)}[name]
    params = {"b": jnp.zeros(5), "i": jnp.arange(3), "flag": jnp.ones(2, bool)}
    grads = {"b": jnp.ones(5), "i": jnp.full(3, 4), "flag": jnp.zeros(2, bool)}
    ours = accumulate(inner, 2)
    theirs = optax.MultiSteps(inner, 2).gradient_transformation()
    states = [tx.init(params) for tx in (ours, theirs)]
    for _ in range(4):
        (actual, ours_after), (expected, theirs_after) = (
            jax.jit(tx.update)(grads, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        )
        assert types(ours_after) == types(states[0])
        states = [ours_after, theirs_after]
        # A sum and a running mean.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), actual, expected
        )
    assert np.all(np.asarray(actual["i"]) != 0)


def test_leaves_that_have_no_sum_are_refused_by_name():
    accumulation = accumulate(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"\['k'\] has dtype key<fry>, and gradients"):
        accumulation.init({"k": jax.random.key(0)})
    params = {"i": jnp.ones(3, jnp.int32)}
    none = {"i": np.zeros(3, jax.dtypes.float0)}
    with pytest.raises(TypeError, match=r"\['i'\] has a gradient of dtype float0"):
        accumulation.update(none, accumulation.init(params), params)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.conditionally_transform(tx, lambda step: True),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    ],
)
def test_what_does_not_take_projected_means_is_refused_by_one_line(wrapper):
    params = zeros(SMALL)
    accumulation = accumulate(wrapper(lowrank_optax.galore(0.1, 2)), 2)
    state = accumulation.init(params)
    with pytest.raises(TypeError, match=r"projected gradients .*apply_if_finite by"):
        jax.eval_shape(accumulation.update, params, state, params)


def test_another_fault_inside_is_not_taken_for_that():
    def broken(updates, params=None):
        raise TypeError("not this one")

    tx = optax.chain(optax.stateless(broken), lowrank_optax.galore(0.1, 2))
    params = zeros(SMALL)
    accumulation = accumulate(tx, 2)
    with pytest.raises(TypeError, match="not this one"):
        accumulation.update(params, accumulation.init(params), params)


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda tx: tx._replace(init=tx.init),
        lambda tx: tx._replace(update=jax.jit(tx.update)),
    ],
)
def test_a_copy_adds_and_finishes_too(again):
    params = zeros({"b": (5,)})
    accumulation = again(accumulate(optax.sgd(1.0), 2))
    state = accumulation.add(gradients(params, 0), accumulation.init(params))
    updates, _ = accumulation.finish(state, params)
    np.testing.assert_array_equal(updates["b"], -gradients(params, 0)["b"])
    init, _ = accumulation
    assert types(init(params)) == types(accumulation.init(params))


def test_projections_looks_through_an_accumulation():
    tx = lowrank_optax.galore(0.1, 2)
    params = zeros(SMALL)
    expected = lowrank_optax.projections(tx, params)
    assert expected["['layers']"].is_projected
    assert lowrank_optax.projections(accumulate(tx, K), params) == expected


def test_sums_are_divided_by_the_sum_of_the_weights():
    """SGD, because Adam's first update does not show the size of a mean."""
    params = {"w": jnp.zeros((8, 6)), "b": jnp.zeros(6)}
    optimizer = lowrank_optax.scale_by_low_rank(optax.identity(), 2)
    accumulation = lowrank_optax.accumulate(optimizer, 2)
    grads, state = random_like({"w": (8, 6), "b": (6,)}), accumulation.init(params)
    for weight in (3.0, 5.0):
        updates, state = accumulation.update(grads, state, params, weight=weight)
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        updates,
        expected,
    )
