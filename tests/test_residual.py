"""What becomes of the residual: the methods that are nothing more, states, refusals.

The equations are held against float64 NumPy in ``test_oracles``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import Projected
from tests.suite import gradients, run, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 3
SHAPES = {"w": (2, 12, 8), "wide": (8, 16), "small": (5, 3), "bias": (8,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
RULES = {
    "scaled": lowrank_optax.scaled_residual,
    "sign": lowrank_optax.sign_residual,
    "normalized": lowrank_optax.normalized_residual,
    "orthogonalized": lowrank_optax.orthogonalized_residual,
}
every_rule = pytest.mark.parametrize("name", RULES)


def low_rank(residual, **options):
    options = {"refresh": lowrank_optax.every(3), **options}
    return lowrank_optax.scale_by_low_rank(
        optax.trace(0.9), RANK, residual=residual, **options
    )


def states(optimizer, steps=5, params=PARAMS):
    return run(jax.jit(optimizer.update), optimizer.init(params), params, range(steps))


ONE_ITERATION = lowrank_optax.range_finder(power_iterations=1)
MATRICES = {"w": PARAMS["w"], "wide": PARAMS["wide"]}
COMPOSED = {
    "adarankgrad": (
        lambda: lowrank_optax.scale_by_adarankgrad(
            RANK, 0.1, residual=lowrank_optax.sign_residual(0.5)
        ),
        lambda: lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(),
            lowrank_optax.energy_rank(RANK, 0.1),
            basis=lowrank_optax.range_finder(power_iterations=2),
            refresh=lowrank_optax.on_convergence(fraction=0.9**0.5),
            rebase="square",
            residual=lowrank_optax.sign_residual(0.5),
        ),
    ),
    "fira": (
        lambda: lowrank_optax.scale_by_fira(RANK, 3, growth=1.2),
        lambda: lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(eps=1e-6),
            RANK,
            basis=ONE_ITERATION,
            refresh=lowrank_optax.every(3),
            rebase="keep",
            residual=lowrank_optax.scaled_residual(
                1.2, inside=0.25, taken=0.25, decays=(0.9, 0.999)
            ),
        ),
    ),
    "low_rank_muon": (
        lambda: lowrank_optax.scale_by_low_rank_muon(
            RANK, 0.8, residual=2.0, refresh=lowrank_optax.every(3)
        ),
        lambda: lowrank_optax.scale_by_low_rank(
            optax.trace(0.8, nesterov=True),
            RANK,
            basis=ONE_ITERATION,
            refresh=lowrank_optax.every(3),
            residual=lowrank_optax.orthogonalized_residual(2.0),
        ),
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_method_is_its_parts_bit_for_bit(name):
    # Matrices alone: vectors have Adam in low_rank_muon.
    (method, parts) = (states(build(), params=MATRICES) for build in COMPOSED[name])
    jax.tree.map(np.testing.assert_array_equal, method[0], parts[0])
    for path, subspace in lowrank_optax.subspaces(parts[1]).items():
        same = lowrank_optax.subspaces(method[1])[path]
        jax.tree.map(np.testing.assert_array_equal, same, subspace)


@every_rule
def test_the_state_of_a_rule_is_a_number_a_matrix_or_nothing(name):
    optimizer = low_rank(RULES[name]())
    _, state = states(optimizer)
    for path, stack in (("['w']", (2,)), ("['wide']", ())):
        found = jax.tree.leaves(lowrank_optax.subspaces(state)[path].residual)
        assert [x.shape for x in found] == ([stack] if name == "scaled" else [])
        assert all(np.all(x > 0) for x in found)
    assert types(state) == types(optimizer.init(PARAMS))
    without = low_rank(None).init(PARAMS)
    more = {"scaled": 4 * 3}.get(name, 0)
    difference = sum(x.nbytes for x in jax.tree.leaves(state))
    difference -= sum(x.nbytes for x in jax.tree.leaves(without))
    assert difference == more


@every_rule
def test_updates_leave_the_subspace_and_keep_the_leafs_dtype(name):
    params = {name: x.astype(jnp.bfloat16) for name, x in PARAMS.items()}
    history, _ = states(low_rank(RULES[name]()), 2, params)
    for updates in history:
        assert {x.dtype for x in updates.values()} == {jnp.dtype(jnp.bfloat16)}
        for leaf in ("w", "wide"):
            rank = jnp.linalg.matrix_rank(updates[leaf].astype(jnp.float32), rtol=0.02)
            assert np.all(rank > RANK)


@every_rule
def test_a_leaf_at_full_size_has_no_residual(name):
    history, _ = states(low_rank(RULES[name]()), 1)
    grads = gradients(PARAMS, 0)
    np.testing.assert_array_equal(history[0]["bias"], grads["bias"])
    if name != "orthogonalized":
        np.testing.assert_array_equal(history[0]["small"], grads["small"])
        return
    # A matrix is orthogonalized there too: 0.2 sqrt(5) times 0.7 to 1.2.
    values = np.linalg.svd(history[0]["small"], compute_uv=False)
    assert np.all((values > 0.6 * 0.2 * 5**0.5) & (values < 1.25 * 0.2 * 5**0.5))


@every_rule
def test_a_zero_gradient_gives_a_zero_update_and_no_nan_after_it(name):
    optimizer = low_rank(RULES[name]())
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = update(nothing, state, PARAMS)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
    for step in range(2):
        updates, state = update(gradients(PARAMS, step), state, PARAMS)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("size", [1e-22, 1e-12, 1.0, 1e15, 1e25])
@pytest.mark.parametrize("name", ["sign", "normalized"])
def test_rounding_is_no_residual(name, size):
    """A gradient with fewer directions than the basis has columns: E is 0."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 24))
    # Small rows have roundings as small as they are.
    grads[:8] *= 1e-6
    inside = {"w": jnp.asarray(size * grads, jnp.float32)}
    optimizer = lowrank_optax.scale_by_low_rank(
        optax.scale(0.0), RANK, basis=ONE_ITERATION, residual=RULES[name]()
    )
    updates, state = optimizer.update(inside, optimizer.init(inside))
    np.testing.assert_array_equal(updates["w"], 0)
    # A third direction of a thousandth of the size is no rounding.
    grads[30] += 1e-3 * rng.normal(size=24)
    outside = {"w": jnp.asarray(size * grads, jnp.float32)}
    updates, _ = optimizer.update(outside, state, refresh=False)
    part = np.abs(updates["w"])
    basis = np.float64(lowrank_optax.subspaces(state)["['w']"].basis)
    rest = np.abs(grads[30] - grads[30] @ basis @ basis.T)
    # One entry at most is lost in the rounding beside the basis, by chance.
    is_seen = rest > 1e-6 * np.linalg.norm(grads[30])
    assert np.sum(is_seen) >= 24 - (size == 1e25)
    assert np.all(part[30][is_seen] > 0.05)
    np.testing.assert_array_equal(np.delete(part, 30, 0), 0)


@every_rule
def test_gradients_inside_the_subspace_are_refused_by_name(name):
    optimizer = low_rank(RULES[name]())
    state = optimizer.init(PARAMS)
    grads = {**gradients(PARAMS, 0), "wide": Projected(jnp.zeros((16, RANK)))}
    with pytest.raises(ValueError, match=r"\['wide'\].*needs the full gradient"):
        optimizer.update(grads, state, PARAMS)
    sums = lowrank_optax.accumulate(optimizer, 2).init(PARAMS).sums
    assert jax.tree.map(jnp.shape, sums) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lowrank_optax.scaled_residual(0.9), "growth must be >= 1, got 0.9"),
        (lambda: lowrank_optax.sign_residual(-1.0), "weight must be >= 0, got -1.0"),
        (
            lambda: lowrank_optax.normalized_residual(float("nan")),
            "weight must be >= 0",
        ),
        (lambda: lowrank_optax.orthogonalized_residual(-1), "weight must be >= 0"),
        (lambda: lowrank_optax.orthogonalized_residual(ns_steps=0), "ns_steps must be"),
        (lambda: lowrank_optax.orthogonalized_residual(rms=1.0), "rms must be inside"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_rule
def test_its_weight_may_be_injected(name):
    argument = "growth" if name == "scaled" else "weight"

    def build(value):
        return low_rank(RULES[name](**{argument: value}))

    optimizer = optax.inject_hyperparams(build)(1.5)
    actual, _ = states(optimizer)
    expected, _ = states(build(1.5))
    # Another program: float32 rounding, which Newton-Schulz enlarges.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
        actual,
        expected,
    )
