"""Fits a basis to a gradient, for the subspace of one leaf."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_optax.codes import encode
from lowrank_optax.matrix.arrays import blank
from lowrank_optax.projected import Sketch
from lowrank_optax.rules.bases import captured_energies
from lowrank_optax.rules.dct_columns import DctColumns
from lowrank_optax.rules.power_iteration import PowerIteration
from lowrank_optax.rules.random_bases import RandomBasis
from lowrank_optax.subspace import Projector, Subspace


def matrix_of(gradient: jax.Array | Sketch, projector: Projector) -> jax.Array:
    """Returns the rows to which a basis is fitted, (*stack, rows, b/c).

    Args:
        gradient: Full gradient, or its sketch.
        projector: Projector of the leaf.
    """
    if isinstance(gradient, Sketch):
        return gradient.rows.astype(projector.dtype)
    return projector.view.oriented(gradient).astype(projector.dtype)


def blended(
    gradient: jax.Array | Sketch,
    means: Sequence[jax.Array],
    subspace: Subspace,
    projector: Projector,
    count: jax.Array,
) -> jax.Array | Sketch:
    """Returns what a basis is fitted to: for most rules, the gradient or its sketch.

    Args:
        gradient: Full gradient, or its sketch.
        means: First moments in the basis in use, (*stack, a*c, r) each; may be empty.
        subspace: Subspace with the basis in use.
        projector: Projector of the leaf.
        count: Updates done.
    """
    rule = projector.parts.basis
    if not isinstance(rule, PowerIteration) or not means:
        return gradient
    assert not isinstance(gradient, Sketch)
    momentum = projector.view.lift(
        means[0].astype(projector.dtype), projector.basis(subspace)
    )
    return rule.blended(gradient.astype(projector.dtype), momentum, count)


def with_basis_of(
    gradient: jax.Array | Sketch,
    subspace: Subspace,
    projector: Projector,
    name_hash: jax.Array,
    count: jax.Array,
) -> tuple[Subspace, jax.Array]:
    """Returns the subspace with a basis of the gradient, and where one was found.

    Args:
        gradient: Full gradient, or its sketch.
        subspace: Subspace with the basis in use.
        projector: Projector of the leaf.
        name_hash: Hash of the leaf's path, for the seeds.
        count: Updates done.
    """
    rule = projector.parts.basis
    assert not isinstance(rule, RandomBasis)
    matrix = matrix_of(gradient, projector)
    if isinstance(rule, DctColumns):
        basis = rule.numbers(matrix, projector.capacity)
    else:
        seeds = projector.seeds(subspace.refreshes - 1, name_hash)
        basis = rule.compute(matrix, projector.basis(subspace), seeds)
        basis = basis.astype(projector.dtype)
    columns = projector.columns_of(basis)
    # Sums of squares keep NaN. XLA's maximum may lose NaN (jaxlib 0.10 and 0.11, CPU).
    squares = jnp.sum(columns**2, axis=-2)
    found = jnp.all(jnp.isfinite(squares) & (squares > 0), axis=-1)
    # This product with the gradient is dropped by the compiler for a fixed rank.
    energies = captured_energies(matrix, columns)
    rank, demand = projector.parts.rank.select(energies, subspace.demand, count)
    basis = encode(below(rank, basis), subspace.basis)
    return subspace._replace(basis=basis, rank=rank, demand=demand), found


def below(rank: jax.Array, array: jax.Array) -> jax.Array:
    """Returns an array (*stack, a, r) with blank columns at and above the rank."""
    position = jax.lax.broadcasted_iota(jnp.int32, array.shape, array.ndim - 1)
    return jnp.where(position < rank[..., None, None], array, blank(array.dtype))
