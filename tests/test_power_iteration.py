"""A basis that follows the last one: what it is, where it starts, what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from tests import references

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 3


def _matrices(count=2, rows=12, columns=8):
    return np.random.default_rng(0).normal(size=(count, rows, columns))


def _orthonormal(columns=8):
    return np.linalg.qr(np.random.default_rng(1).normal(size=(columns, RANK)))[0]


def test_columns_are_those_of_gram_schmidt_in_their_own_order():
    matrix, previous = _matrices()[0], _orthonormal()
    rule = lowrank_optax.power_iteration()
    arrays = (jnp.asarray(x, jnp.float32) for x in (matrix, previous))
    found = jax.jit(rule.compute)(*arrays, jnp.uint32(0))
    expected, _ = references.power_iteration(matrix, previous)
    signs = np.sign(np.sum(found * expected, axis=0))
    # Float32 rounding, over singular values that lie within a factor of 5.
    np.testing.assert_allclose(found, signs * expected, atol=1e-5)


def test_each_matrix_of_a_stack_starts_by_itself():
    matrices = jnp.asarray(_matrices(), jnp.float32)
    previous = jnp.stack([jnp.zeros((8, RANK)), jnp.asarray(_orthonormal())])
    rule = lowrank_optax.power_iteration(start=lowrank_optax.exact_svd())
    seeds = jnp.zeros(2, jnp.uint32)
    found = jax.jit(rule.compute)(matrices, previous.astype(jnp.float32), seeds)
    first, _ = references.exact_svd(np.asarray(matrices[0], np.float64), RANK)
    second, _ = references.power_iteration(matrices[1], previous[1])
    for actual, expected in zip(found, (first, second), strict=True):
        both = np.abs(np.sum(actual * expected, axis=0))
        np.testing.assert_allclose(both, 1, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_there_is_no_basis_of_a_gradient_that_is_not_finite(value):
    matrix = jnp.asarray(_matrices()[0], jnp.float32).at[2, 3].set(value)
    rule = lowrank_optax.power_iteration()
    previous = jnp.asarray(_orthonormal(), jnp.float32)
    found = jax.jit(rule.compute)(matrix, previous, jnp.uint32(0))
    assert not np.any(found)


@pytest.mark.parametrize("shape", [(2, 12, 8), (8, 12)])
@pytest.mark.parametrize("granularity", [1, 2])
def test_the_momentum_is_lifted_from_where_it_is(shape, granularity):
    rho, b1 = 0.7, 0.8
    tx = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(b1),
        RANK,
        basis=lowrank_optax.power_iteration(rho, b1),
        refresh=lowrank_optax.every(1),
        granularity=granularity,
    )
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(3, *shape)), jnp.float32)
    update, state = jax.jit(tx.update), tx.init(grads[0])
    for gradient in grads[:2]:
        _, state = update(gradient, state)
    _, after = update(grads[2], state)

    def oriented(leaf):
        matrices = np.asarray(leaf, np.float64).reshape(-1, *shape[-2:])
        if shape[-2] < shape[-1]:
            matrices = matrices.swapaxes(-1, -2)
        return matrices.reshape(len(matrices), -1, 8 // granularity)

    def pieces(array):
        return np.asarray(array, np.float64).reshape(-1, *array.shape[-2:])

    old, new = pieces(state.subspaces.basis), pieces(after.subspaces.basis)
    means = pieces(state.inner_state.mu)
    source = references.with_momentum(rho, b1)
    for g, m, p, found in zip(oriented(grads[2]), means, old, new, strict=True):
        expected, _ = references.power_iteration(source(g, m, p, 2), p)
        both = np.abs(np.sum(found * expected, axis=0))
        # Squared cosines of float32 columns.
        np.testing.assert_allclose(both, 1, atol=1e-5)


def test_a_weight_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"rho must be inside \[0, 1\), got 1.0"):
        lowrank_optax.power_iteration(1.0)
