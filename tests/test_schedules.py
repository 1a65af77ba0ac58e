"""When bases are renewed: the schedules, and gradients that must not renew one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import lowrank_optax
from lowrank_optax.binding.optimizer import bind
from tests import references


def _gaussian(*shape, seed=0):
    draws = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(draws, jnp.float32)


# --- the rules alone -------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "check_interval"), [(0.0, 1), (0.5, 4), (0.8, 1), (0.95, 1), (0.95, 7)]
)
def test_on_convergence_is_due_when_the_reference_is(decay, check_interval):
    rng = np.random.default_rng(0)
    rule = lowrank_optax.on_convergence(3, 30, 0.9, decay, check_interval)
    expected = [
        references.OnConvergence(3, 30, 0.9, decay, check_interval) for _ in range(4)
    ]
    trend = rule.init(lambda dtype: jnp.zeros(4, dtype))
    age = np.zeros(4, np.int32)
    is_due, refreshes = jax.jit(rule.is_due), 0
    observe = jax.jit(rule.observe)
    for reference in expected:
        reference.refreshed(0)
    for step in range(1, 90):
        # Two layers converge, one does not, one meets a norm that is not finite.
        norms = np.exp(-0.05 * step * np.array([1, 0.3, 0, 1])) * rng.uniform(0.8, 1, 4)
        age += 1
        # Never the first after a refresh, which is that of the gradient it came from.
        norms[3] = np.inf if step % 7 == 0 and age[3] > 1 else norms[3]
        trend = observe(age, trend, _of_norms(norms))
        for reference, norm in zip(expected, norms, strict=True):
            reference.observe(norm)
        due = [reference.is_due(step) for reference in expected]
        np.testing.assert_array_equal(is_due(age, trend), due)
        for reference in (r for r, d in zip(expected, due, strict=True) if d):
            reference.refreshed(step)
        age = np.where(due, 0, age)
        refreshes += sum(due)
    assert refreshes >= 10


def _of_norms(norms):
    """Returns coordinates (4, 2, 2) with these Frobenius norms."""
    return jnp.broadcast_to(
        jnp.asarray(norms / 2, jnp.float32)[:, None, None], (4, 2, 2)
    )


def test_on_noise_that_does_not_change_few_refresh_as_soon_as_they_may():
    """The gradient that a basis was fitted to is no measure of those that follow."""
    params = jnp.zeros((24, 24, 16))
    rule = lowrank_optax.on_convergence(40, 60, 0.9999, decay=0.9, check_interval=5)
    tx = lowrank_optax.scale_by_low_rank(optax.identity(), 4, refresh=rule)

    def body(state, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        _, after = tx.update(jax.random.normal(key, params.shape), state)
        renewed = after.subspaces.refreshes > state.subspaces.refreshes
        return after, (state.subspaces.age, renewed)

    scanned = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(400))[1])
    ages, renewed = map(np.asarray, scanned(tx.init(params)))
    intervals = ages[renewed & (ages > 0)]
    # Two means of about the same noise: either is the smaller one half of the time.
    # With the fitted gradient in the reference it was 0.9.
    assert len(intervals) > 150
    assert np.mean(intervals == 40) < 0.65


def test_on_convergence_waits_for_min_interval_and_never_beyond_max_interval():
    rule = lowrank_optax.on_convergence(5, 9, 0.5, decay=0.0, check_interval=1)
    trend = rule.init(lambda dtype: jnp.ones((), dtype))
    fallen = trend._replace(average=jnp.float32(0.1))
    steady = trend
    assert [bool(rule.is_due(age, fallen)) for age in (4, 5)] == [False, True]
    assert [bool(rule.is_due(age, steady)) for age in (8, 9)] == [False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lowrank_optax.every(0), "interval must be >= 1, got 0"),
        (
            lambda: lowrank_optax.on_convergence(0, 9),
            "min_interval must be >= 1, got 0",
        ),
        (
            lambda: lowrank_optax.on_convergence(9, 8),
            "max_interval must be >= min_interval, got min_interval=9, max_interval=8",
        ),
        (
            lambda: lowrank_optax.on_convergence(fraction=1.0),
            r"fraction must be inside \(0, 1\), got 1.0",
        ),
        (
            lambda: lowrank_optax.on_convergence(decay=1.0),
            r"decay must be inside \[0, 1\), got 1.0",
        ),
        (
            lambda: lowrank_optax.on_convergence(check_interval=0),
            "check_interval must be >= 1, got 0",
        ),
    ],
)
def test_a_value_out_of_its_range_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- leaf by leaf ----------------------------------------------------------------


def _identity(rank=3, **parts):
    """Projection and nothing else: no moment carries a bad gradient on."""
    return lowrank_optax.scale_by_low_rank(optax.identity(), rank=rank, **parts)


def _refresh_steps(tx, grads):
    """Returns leaf -> steps at which its basis was renewed."""

    def step(state, gradient):
        _, state = tx.update(gradient, state)
        return state, {k: s.refreshes for k, s in state.subspaces.items()}

    first = jax.tree.map(lambda g: g[0], grads)
    counts = jax.jit(lambda g: jax.lax.scan(step, tx.init(first), g)[1])(grads)
    return {k: list(np.flatnonzero(np.diff(c, prepend=0))) for k, c in counts.items()}


def test_every_spreads_the_leaves_over_the_interval_after_the_first_step():
    grads = {name: _gaussian(20, 4, 3) for name in "abcde"}
    tx = _identity(1, basis=lowrank_optax.exact_svd(), refresh=lowrank_optax.every(7))
    found = _refresh_steps(tx, grads)
    # Leaf i of 5 comes floor(7 i / 5) updates early once.
    assert found == {
        "a": [0, 7, 14],
        "b": [0, 6, 13],
        "c": [0, 5, 12, 19],
        "d": [0, 3, 10, 17],
        "e": [0, 2, 9, 16],
    }


def test_without_staggering_all_leaves_refresh_on_the_same_step():
    grads = {name: _gaussian(9, 4, 3) for name in "ab"}
    every_4 = lowrank_optax.every(4, stagger=False)
    tx = _identity(1, basis=lowrank_optax.exact_svd(), refresh=every_4)
    assert _refresh_steps(tx, grads) == {"a": [0, 4, 8], "b": [0, 4, 8]}


# --- gradients that give no basis --------------------------------------------------


@functools.cache
def _compiled():
    """A transformation due every third update, and its compiled update."""
    tx = _identity(refresh=lowrank_optax.every(3))
    return tx, jax.jit(tx.update)


def _spoiled(gradient, value):
    return gradient.at[2, 1].set(value)


bad_values = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


@bad_values
def test_a_bad_first_gradient_gives_no_basis_and_the_next_one_does(value):
    tx, update = _compiled()
    grads = _gaussian(2, 10, 8)
    _, state = update(_spoiled(grads[0], value), tx.init(grads[0]))
    assert not np.any(state.subspaces.basis)
    assert (int(state.subspaces.refreshes), int(state.subspaces.age)) == (0, 0)
    updates, state = update(grads[1], state)
    _, untouched = update(grads[1], tx.init(grads[0]))
    np.testing.assert_array_equal(state.subspaces.basis, untouched.subspaces.basis)
    assert np.all(np.isfinite(updates))


@bad_values
@pytest.mark.parametrize("bad_step", [1, 2, 3, 4])
def test_a_bad_gradient_never_replaces_a_basis_and_a_due_refresh_is_repeated(
    bad_step, value
):
    tx, update = _compiled()
    grads = _gaussian(7, 10, 8)
    state, refreshes, bases = tx.init(grads[0]), [], []
    for step, gradient in enumerate(grads):
        gradient = _spoiled(gradient, value) if step == bad_step else gradient
        _, state = update(gradient, state)
        refreshes.append(int(state.subspaces.refreshes))
        bases.append(np.asarray(state.subspaces.basis))
        assert np.all(np.isfinite(bases[-1]))
    np.testing.assert_array_equal(bases[bad_step], bases[bad_step - 1])
    due = 4 if bad_step == 3 else 3
    assert list(np.flatnonzero(np.diff(refreshes, prepend=0))) == [
        step for step in (0, due, due + 3) if step < len(grads)
    ]


@pytest.mark.parametrize("basis", [lowrank_optax.range_finder(), None], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_gradient_without_rank_makes_no_nan_on_the_way_either(value, basis):
    """What ``jax_debug_nans`` and checkify stop at, though nothing of it comes out."""
    tx = lowrank_optax.adarankgrad(0.1, 3, basis=basis)
    params = {"w": jnp.full((8, 6), value)}
    checked = checkify.checkify(
        lambda g, s: tx.update(g, s, g), errors=checkify.float_checks
    )
    error, _ = jax.jit(checked)(params, tx.init(params))
    assert error.get() is None


def test_zero_gradients_give_zero_updates_and_keep_the_basis():
    tx, update = _compiled()
    gradient = _gaussian(10, 8)
    zeros = jnp.zeros_like(gradient)
    first, state = update(zeros, tx.init(gradient))
    np.testing.assert_array_equal(first, zeros)
    assert int(state.subspaces.refreshes) == 0
    _, state = update(gradient, state)
    basis = state.subspaces.basis
    for _ in range(5):
        updates, state = update(zeros, state)
        np.testing.assert_array_equal(updates, zeros)
        np.testing.assert_array_equal(state.subspaces.basis, basis)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_a_basis_does_not_depend_on_the_size_of_the_gradient(scale):
    # Squares of these overflow or underflow in float32.
    tx, update = _compiled()
    gradient = _gaussian(10, 8)
    plain = update(gradient, tx.init(gradient))[1].subspaces.basis
    scaled = update(gradient * scale, tx.init(gradient))[1].subspaces.basis
    # The rounding of the scaled entries.
    np.testing.assert_allclose(scaled, plain, atol=1e-4)


# --- Adam, with the rank and the refresh by the gradients -----------------------------

LAYERS, STEPS = 3, 16


BASES = {
    "exact_svd": lowrank_optax.exact_svd(),
    "range_finder": lowrank_optax.range_finder(oversample=1, warm_start=True),
}


@functools.cache
def _adaptive(basis="range_finder"):
    tx = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        rank=lowrank_optax.energy_rank(4, threshold=0.1),
        basis=BASES[basis],
        refresh=lowrank_optax.on_convergence(2, 6, 0.9, decay=0.5, check_interval=1),
    )

    def step(state, gradient):
        updates, state = tx.update({"w": gradient}, state)
        return state, (updates["w"], state.subspaces["w"])

    return jax.jit(lambda g: jax.lax.scan(step, tx.init({"w": g[0]}), g)[1])


@functools.cache
def _layers():
    rng = np.random.default_rng(0)
    grads = [references.drifting_gradients(rng, STEPS, (9, 7)) for _ in range(LAYERS)]
    # Different decays, so that the layers converge at different steps.
    fall = np.exp(-np.arange(STEPS)[:, None] * np.array([0, 0.15, 0.3]))
    return np.stack(grads, axis=1) * fall[..., None, None]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gradients_that_lack_rank_give_finite_updates(rank):
    rng = np.random.default_rng(rank)
    grads = rng.normal(size=(STEPS, 9, rank)) @ rng.normal(size=(STEPS, rank, 7))
    updates, subspace = jax.device_get(_adaptive()(jnp.asarray(grads, jnp.float32)))
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(subspace.basis))
    assert np.any(updates) == (rank > 0)


# --- stacks: each matrix by itself ---------------------------------------------------


def _with_bad_layer(bad, step):
    grads = _layers().copy()
    grads[step, 1] = bad
    return grads


SITUATIONS = {
    "layers due at different steps": _layers,
    "one layer not finite at the first step": lambda: _with_bad_layer(np.nan, 0),
    "one layer not finite later": lambda: _with_bad_layer(np.inf, 6),
    "one layer zero at first": lambda: _with_bad_layer(0.0, 0),
    "one layer of rank one": lambda: _with_bad_layer(
        np.outer(np.arange(9.0), np.arange(7.0)), slice(None)
    ),
}


def _nothing_beside(grads, layer):
    """The layer in its place, by which it has its draws, and zeros in the others."""
    alone = jnp.zeros_like(grads).at[:, layer].set(grads[:, layer])
    found = jax.device_get(_adaptive()(alone))
    return jax.tree.map(lambda x: x[:, layer], found)


ALONE = {
    # An SVD draws nothing: the same as a leaf of its own.
    "exact_svd": lambda grads, layer: jax.device_get(
        _adaptive("exact_svd")(grads[:, layer])
    ),
    "range_finder": _nothing_beside,
}


@pytest.mark.parametrize("basis", ALONE)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_layer_of_a_stack_gets_the_update_that_it_gets_alone(situation, basis):
    grads = jnp.asarray(SITUATIONS[situation](), jnp.float32)
    updates, subspaces = jax.device_get(_adaptive(basis)(grads))
    schedules = set()
    for layer in range(LAYERS):
        alone, subspace = ALONE[basis](grads, layer)
        np.testing.assert_array_equal(subspaces.rank[:, layer], subspace.rank)
        np.testing.assert_array_equal(subspaces.refreshes[:, layer], subspace.refreshes)
        assert np.all(np.isfinite(subspaces.basis[:, layer]))
        # Batched products may add in another order. That rounding, 1e-7, is divided by
        # a gap of squared singular values, 1e-2, and by the root of a small moment.
        np.testing.assert_allclose(updates[:, layer], alone, rtol=0, atol=5e-4)
        schedules.add(tuple(subspace.refreshes))
    assert len(schedules) > 1, "all layers refreshed at the same steps"


def test_a_basis_converges_at_the_root_of_the_energy_that_is_left():
    """Theorem 2: norms fall by sqrt(1 - threshold)."""
    params = {"w": jnp.zeros((12, 8))}
    optimizer = lowrank_optax.adarankgrad(0.1, 2, threshold=0.19)
    (bound,) = bind(optimizer, params).transformations
    assert bound.parts.refresh.fraction == pytest.approx(0.9)
