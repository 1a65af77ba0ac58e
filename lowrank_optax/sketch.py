"""Sketches: the test matrix of a leaf, and the shape of its sketch."""

from typing import Any

import jax

from lowrank_optax.matrix.sharding import basis_axes, zeros_beside
from lowrank_optax.rules.hashing import hashed, hashed_uniform
from lowrank_optax.subspace import Projector, Subspace

# The draws of a test matrix differ from those of a basis rule with the same seed.
_OWN = 0x5BD1E995


def width_of(projector: Projector, oversample: int | None) -> int:
    """Returns k, the rows of a leaf's sketch: at most those of its gradient.

    Args:
        projector: Projector of the leaf.
        oversample: Rows beyond the capacity; None: as many again.
    """
    more = projector.capacity if oversample is None else oversample
    return min(projector.capacity + more, projector.view.kept_size)


def omega_of(projector: Projector, subspace: Subspace, width: int) -> jax.Array:
    """Returns Omega (*stack, a*c, k), with entries of mean 0 and variance 1 / k.

    Omega stays the same up to the next renewal of the basis, so that sketches of
    several gradients can be added up.

    Args:
        projector: Projector of the leaf.
        subspace: Subspace of the leaf.
        width: k.
    """
    seeds = hashed(projector.seeds(subspace.refreshes, projector.name_hash) ^ _OWN)
    shape = (projector.view.kept_size, width)
    return hashed_uniform(seeds, shape, projector.dtype) * (3 / width) ** 0.5


def sketch_beside(leaf: Any, projector: Projector, width: int) -> jax.Array:
    """Returns zeros like the rows of a sketch, with the leaf's sharding."""
    view = projector.view
    *stack, side, never = basis_axes(view)
    shape = (*view.stack, width, view.projected_size)
    return zeros_beside(leaf, shape, projector.dtype, (*stack, never, side))
