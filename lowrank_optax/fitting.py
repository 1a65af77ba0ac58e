"""A basis fitted to a gradient: the subspace of one leaf with a new one in it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_optax.codes import decode, encode
from lowrank_optax.rules.bases import captured_energies
from lowrank_optax.rules.power_iteration import PowerIteration
from lowrank_optax.rules.random_bases import RandomBasis
from lowrank_optax.subspace import Projector, Subspace


def blended(
    gradient: jax.Array,
    means: Sequence[jax.Array],
    subspace: Subspace,
    projector: Projector,
    count: jax.Array,
) -> jax.Array:
    """Returns what a basis is fitted to: the gradient, for most rules.

    Args:
        gradient: At full size.
        means: First moments in the basis in use, (*stack, a*c, r) each, or none.
        subspace: With the basis in use.
        projector: Of the leaf.
        count: Updates done.
    """
    rule = projector.parts.basis
    if not isinstance(rule, PowerIteration) or not means:
        return gradient
    momentum = projector.view.lift(
        means[0].astype(projector.dtype), decode(subspace.basis)
    )
    return rule.blended(gradient.astype(projector.dtype), momentum, count)


def with_basis_of(
    gradient: jax.Array, subspace: Subspace, projector: Projector, name_hash: jax.Array
) -> tuple[Subspace, jax.Array]:
    """Returns the subspace with a basis of the gradient, and where there is one."""
    parts = projector.parts
    assert not isinstance(parts.basis, RandomBasis)
    matrix = projector.view.oriented(gradient).astype(projector.dtype)
    seeds = projector.seeds(subspace.refreshes - 1, name_hash)
    columns = parts.basis.compute(matrix, decode(subspace.basis), seeds)
    # By squares, which keep NaN: XLA's maximum may pass over it (jaxlib 0.10 and 0.11,
    # CPU).
    squares = jnp.sum(columns**2, axis=-2)
    found = jnp.all(jnp.isfinite(squares) & (squares > 0), axis=-1)
    # A product with the gradient, which the compiler drops for a fixed rank.
    energies = captured_energies(matrix, columns)
    rank, demand = parts.rank.select(energies, subspace.demand)
    columns = below(rank, columns).astype(projector.dtype)
    basis = encode(columns, subspace.basis)
    return subspace._replace(basis=basis, rank=rank, demand=demand), found


def below(rank: jax.Array, array: jax.Array) -> jax.Array:
    """Returns an array (*stack, a, r) with zeros in columns at and above the rank."""
    position = jax.lax.broadcasted_iota(jnp.int32, array.shape, array.ndim - 1)
    return jnp.where(position < rank[..., None, None], array, 0)
