"""Sketches: the test matrices of leaves, and the shapes of their sketches."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import basis_axes, zeros_beside
from lowrank_optax.rules.dct_columns import cosine_columns
from lowrank_optax.rules.hashing import hashed, hashed_seed, hashed_uniform
from lowrank_optax.subspace import Projector, Subspace


def width_of(projector: Projector, oversample: int | None) -> int:
    """Returns k, the rows of a leaf's sketch: at most those of its gradient.

    Args:
        projector: Projector of the leaf.
        oversample: Rows beyond the capacity; None: as many again.
    """
    more = projector.capacity if oversample is None else oversample
    return min(projector.capacity + more, projector.view.kept_size)


def omegas_of(
    projectors: Mapping[tuple, Projector],
    slots: Mapping[tuple, Subspace],
    oversample: int | None,
) -> dict[tuple, jax.Array]:
    r"""Returns test matrices of leaves of one transformation, by key path.

    Leaves with as many rows and as wide a sketch share one Omega, and so do all
    matrices of a stack: sketches stay unbiased each for itself, and test matrices of
    their own would take more memory than the sketches.

    Omega stays the same up to the next renewal of a basis, of the leaf renewed most
    often.

    Args:
        projectors: Projectors of the leaves, by key path.
        slots: Subspaces of all leaves of the transformation; not empty.
        oversample: See :func:`width_of`.

    Returns:
        Key path -> Omega (a*c, k), from :func:`omega_of`.
    """
    refreshes = [jnp.max(slot.refreshes) for slot in slots.values()]
    number = jnp.max(jnp.stack(refreshes)).astype(jnp.uint32)
    known: dict[tuple, jax.Array] = {}
    found = {}
    for path, projector in projectors.items():
        width = width_of(projector, oversample)
        key = projector.view.kept_size, width, projector.dtype
        if key not in known:
            seed = hashed_seed(projector.parts.seed)
            known[key] = omega_of(hashed(seed + number), *key)
        found[path] = known[key]
    return found


def omega_of(seed: jax.Array, n: int, width: int, dtype: Any) -> jax.Array:
    r"""Returns a test matrix Omega (n, k) with E[Omega Omega^T] = I.

    Omega has k random columns of a cosine transform, and random signs of its rows. With
    signs s_i, different frequencies f_j, and u_f = 1 but for u_0 = sqrt(1/2):

    .. math::
        \Omega_{ij} = s_i u_{f_j} \sqrt{2 / k} \cos(\pi (2 i + 1) f_j / (2 n))

    Columns are orthogonal, and their length is sqrt(n / k): independent entries would
    lose more where k is not far below n.

    Args:
        seed: (), uint32.
        n: Rows.
        width: k, at most n.
        dtype: Of the result.

    References:
        Tropp, `Improved analysis of the subsampled randomized Hadamard transform
        <https://arxiv.org/abs/1011.1595>`_, 2011, with a cosine transform.
    """
    # Draws unlike those that a basis rule makes with the same seed.
    signs, order = (
        hashed_uniform(hashed(seed ^ own), (n, 1), jnp.float32)[:, 0]
        for own in (0x5BD1E995, 0x1B873593)
    )
    frequencies = jnp.argsort(order)[:width]
    columns = cosine_columns(frequencies[None, :], n, dtype)
    return columns * (jnp.sign(signs)[:, None] * math.sqrt(n / width))


def sketch_beside(leaf: Any, projector: Projector, width: int) -> jax.Array:
    """Returns zeros like the rows of a sketch, with the leaf's sharding."""
    view = projector.view
    *stack, side, never = basis_axes(view)
    shape = (*view.stack, width, view.projected_size)
    return zeros_beside(leaf, shape, projector.dtype, (*stack, never, side))
