"""Moments in a new basis: each rule's formula, and the second moment's sign."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import REBASE_RULES
from lowrank_optax.rules.rebase import random_transfer, transfer
from tests import references

pytestmark = pytest.mark.usefixtures("fast_compilation")

STEPS, ROWS, COLUMNS, RANK = 51, 9, 6, 3
RULES = {
    **REBASE_RULES,
    "ldadam with decays": lowrank_optax.ldadam_rebase(b1=0.8, b2=0.95),
}
every_rule = pytest.mark.parametrize("name", RULES)


def _reference(name):
    decays = {"b1": 0.8, "b2": 0.95} if name == "ldadam with decays" else {}
    return references.rebase(name.split()[0], **decays)


def _transfers():
    """Returns R of two bases that share a subspace in part."""
    rng = np.random.default_rng(0)
    old, new = (np.linalg.qr(rng.normal(size=(8, 4)))[0] for _ in range(2))
    return old, new, old.T @ new


def test_transfer_is_the_product_of_old_and_new():
    old, new, expected = _transfers()
    found = transfer(jnp.asarray(old), jnp.asarray(new))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@every_rule
@pytest.mark.parametrize("count", [1, 40])
def test_each_rule_is_its_formula(name, count):
    rng = np.random.default_rng(1)
    *_, r = _transfers()
    m, v = 0.1 * rng.normal(size=(5, 4)), rng.uniform(size=(5, 4))
    expected_m, expected_v = _reference(name)(m, v, r, count)
    m, v, r = (jnp.asarray(x, jnp.float32) for x in (m, v, r))
    np.testing.assert_allclose(RULES[name].first(m, r), expected_m, atol=1e-6)
    # 1 - 0.999 has three digits less than float32 has, and divides in "ldadam".
    actual = RULES[name].second(v, m, r, jnp.int32(count))
    np.testing.assert_allclose(actual, expected_v, atol=1e-4)


def test_filled_is_exact_inside_the_old_subspace_and_the_mean_outside_of_it():
    v = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 3)), jnp.float32)
    # Two columns change places; the third is new; an old fourth was not in use.
    r = np.zeros((4, 3))
    r[1, 0] = r[0, 1] = 1
    r[2, 2] = 1e-3
    wide = jnp.pad(v, ((0, 0), (0, 1)))
    rule = REBASE_RULES["filled"].second
    found = rule(wide, jnp.zeros_like(wide), jnp.asarray(r, jnp.float32), jnp.int32(1))
    expected = np.stack([v[:, 1], v[:, 0], np.mean(v, axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Least and most of the norm of updates after a refresh, by that before it.
NORMS = {
    "filled": (0.65, 1.05),
    "first": (0.65, 1.05),
    "keep": (0.95, 1.15),
    "zero": (0.45, 1.05),
    "square": (1.2, 2.0),
    "abs": (1.2, 2.6),
    "ldadam": (1.2, 2.0),
    # Columns without a second moment divide by eps.
    "clamp": (1.3, np.inf),
}


@pytest.mark.parametrize("name", REBASE_RULES)
def test_the_norm_of_updates_across_a_refresh(name):
    """On noise that does not change, with a subspace that turns nearly all the way."""
    gap, shape = 100, (96, 64)
    tx = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        16,
        rebase=name,
        refresh=lowrank_optax.every(gap, stagger=False),
    )

    def body(state, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        updates, state = tx.update(jax.random.normal(key, shape), state)
        return state, jnp.linalg.norm(updates)

    start = tx.init(jnp.zeros(shape))
    run = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(2 * gap))[1])
    norms = np.asarray(run(start))
    after = norms[gap : gap + 50] / norms[gap - 50 : gap].mean()
    least, most = NORMS[name]
    assert np.min(after) > least
    assert np.max(after) < most


def test_square_is_exact_where_the_columns_are_only_permuted():
    r = jnp.asarray(np.eye(4)[[2, 0, 3, 1]], jnp.float32)
    v = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4)), jnp.float32)
    found = REBASE_RULES["square"].second(v, jnp.zeros_like(v), r, jnp.int32(1))
    np.testing.assert_array_equal(found, v[:, [1, 3, 0, 2]])


@functools.cache
def _random_gradients():
    """Vectors drawn anew at every step; singular values apart, so that bases are."""
    rng = np.random.default_rng(2)
    grads = []
    for _ in range(STEPS):
        u = np.linalg.qr(rng.normal(size=(ROWS, COLUMNS)))[0]
        v = np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))[0]
        grads.append((u * 0.6 ** np.arange(COLUMNS)) @ v.T)
    return np.asarray(grads)


def _low_rank(rebase, inner=None, rank=RANK):
    return lowrank_optax.scale_by_low_rank(
        inner or optax.scale_by_adam(),
        rank=rank,
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(1),
        rebase=rebase,
    )


@functools.cache
def _run(name):
    """Adam inside, a new basis at every step; (updates, states) over all steps."""
    tx = _low_rank(RULES[name])

    def step(state, gradient):
        update, state = tx.update(gradient, state)
        return state, (update, state)

    grads = jnp.asarray(_random_gradients(), jnp.float32)
    start = tx.init(grads[0])
    return jax.device_get(jax.jit(lambda g: jax.lax.scan(step, start, g)[1])(grads))


@every_rule
def test_the_second_moment_is_never_negative_over_fifty_refreshes(name):
    _, states = _run(name)
    assert states.subspaces.refreshes[-1] == STEPS
    assert np.min(states.inner_state.nu) >= 0
    assert np.all(np.isfinite(states.inner_state.nu))


@every_rule
def test_every_rule_is_that_of_the_reference_over_fifty_refreshes(name):
    updates, states = _run(name)
    expected, records = references.low_rank(
        list(_random_gradients()),
        capacity=RANK,
        inner=references.adam(),
        basis=lambda a, p, i: references.exact_svd(a, RANK),
        rank=references.fixed_rank(RANK),
        schedule=references.Every(1),
        rebase=_reference(name),
        like=list(states.subspaces.basis),
    )
    moments = states.inner_state
    for actual, wanted in (
        (moments.mu, [record.first for record in records]),
        (moments.nu, [record.second for record in records]),
        (updates, expected),
    ):
        # Rounding of 50 transfers, in units of the largest entry; "ldadam" divides by
        # 1 - b2^t, and Adam by the root of moments that are small beside the others.
        atol = 1e-4 * np.max(np.abs(wanted))
        np.testing.assert_allclose(actual, np.asarray(wanted), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["filled", "square", "ldadam", "zero"])
def test_rules_without_a_sign_give_the_same_update_whatever_the_columns_signs(name):
    tx = _low_rank(name)
    grads = jnp.asarray(_random_gradients(), jnp.float32)
    update = jax.jit(tx.update)
    state = update(grads[1], update(grads[0], tx.init(grads[0]))[1])[1]
    signs = jnp.asarray([1.0, -1.0, 1.0])
    flipped = state._replace(
        subspaces=state.subspaces._replace(basis=state.subspaces.basis * signs),
        inner_state=state.inner_state._replace(mu=state.inner_state.mu * signs),
    )
    expected, actual = update(grads[2], state)[0], update(grads[2], flipped)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", REBASE_RULES)
def test_before_the_first_basis_there_is_nothing_to_rebase(name):
    # An inner state that does not start from zero: optax.adagrad's, RMS's with a scale.
    tx = _low_rank(name, optax.scale_by_rms(0.9, initial_scale=1.0))
    gradient = jnp.asarray(_random_gradients()[0], jnp.float32)
    _, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    projected = gradient @ state.subspaces.basis
    np.testing.assert_allclose(
        state.inner_state.nu, 0.9 + 0.1 * projected**2, rtol=1e-5
    )


@every_rule
def test_moments_above_the_rank_are_zero_and_those_below_follow_the_rule(name):
    """The rank falls from 5 to 2 and rises again; the old columns are gone by then."""
    capacity, in_use = 6, [5, 2, 4]
    rng = np.random.default_rng(3)
    grads = [rng.normal(size=(ROWS, k)) @ rng.normal(size=(k, 7)) for k in in_use]
    rank = lowrank_optax.energy_rank(capacity, 1e-6, min_rank=1, smoothing=0.0)
    tx = _low_rank(RULES[name], rank=rank)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros((ROWS, 7)))
    m = v = old = None
    for count, (gradient, k) in enumerate(zip(grads, in_use, strict=True)):
        _, state = update(jnp.asarray(gradient, jnp.float32), state)
        assert int(state.subspaces.rank) == k
        new = np.asarray(state.subspaces.basis, np.float64)
        if old is None:
            m = v = np.zeros((ROWS, capacity))
        else:
            m, v = _reference(name)(m, v, old.T @ new, count)
        m, v = (np.where(np.arange(capacity) < k, x, 0) for x in (m, v))
        m, v = 0.9 * m + 0.1 * gradient @ new, 0.999 * v + 0.001 * (gradient @ new) ** 2
        old = new
        for actual, wanted in ((state.inner_state.mu, m), (state.inner_state.nu, v)):
            assert not np.any(actual[:, k:])
            # Float32 sums of seven products; "ldadam" divides by 1 - 0.999^t.
            atol = 1e-4 * np.max(np.abs(wanted))
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_a_rule_of_ones_own_is_used():
    rule = lowrank_optax.RebaseRule(
        first=lambda m, r: jnp.full_like(m, 2.0),
        second=lambda v, m, r, count: jnp.full_like(v, 3.0),
    )
    tx = _low_rank(rule)
    grads = jnp.asarray(_random_gradients(), jnp.float32)
    update = jax.jit(tx.update)
    _, state = update(grads[1], update(grads[0], tx.init(grads[0]))[1])
    projected = grads[1] @ state.subspaces.basis
    np.testing.assert_allclose(
        state.inner_state.mu, 0.9 * 2 + 0.1 * projected, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.inner_state.nu, 0.999 * 3 + 0.001 * projected**2, rtol=1e-5
    )


def test_an_unknown_rule_raises_and_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"rebase must be one of \['abs', .*got 'none'"
    ):
        _low_rank("none")


def test_a_random_basis_with_equal_columns_hands_on_a_finite_momentum():
    # Signs of three rows: two columns coincide once in four draws.
    old = jnp.asarray([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    new = jnp.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    gradient = jnp.asarray([[3.0, 1.0, 2.0], [0.5, -1.0, 4.0]])
    r = random_transfer(old, new)
    expected = gradient @ old @ np.linalg.pinv(old) @ new
    # The ridge, 1e-6, and float32 rounding over it.
    np.testing.assert_allclose(gradient @ old @ r, expected, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_the_transfer_of_equal_columns_does_not_depend_on_their_size(size):
    old = size * jnp.asarray([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    new = size * jnp.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    gradient = jnp.asarray([[3.0, 1.0, 2.0], [0.5, -1.0, 4.0]])
    r = random_transfer(old, new)
    expected = gradient @ old @ np.linalg.pinv(old) @ new
    np.testing.assert_allclose(gradient @ old @ r, expected, rtol=1e-3)
