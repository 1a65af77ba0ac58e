"""Sketches: the test matrix of a leaf, and the shape of its sketch."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import basis_axes, zeros_beside
from lowrank_optax.rules.hashing import hashed, hashed_uniform
from lowrank_optax.subspace import Projector, Subspace


def width_of(projector: Projector, oversample: int | None) -> int:
    """Returns k, the rows of a leaf's sketch: at most those of its gradient.

    Args:
        projector: Projector of the leaf.
        oversample: Rows beyond the capacity; None: as many again.
    """
    more = projector.capacity if oversample is None else oversample
    return min(projector.capacity + more, projector.view.kept_size)


def omega_of(projector: Projector, subspace: Subspace, width: int) -> jax.Array:
    r"""Returns a test matrix Omega (*stack, a*c, k) with E[Omega Omega^T] = I.

    Omega has k random columns of a cosine transform, and random signs of its rows. With
    n = a c, signs s_i, different frequencies f_j, and u_f = 1 but for u_0 = sqrt(1/2):

    .. math::
        \Omega_{ij} = s_i u_{f_j} \sqrt{2 / k} \cos(\pi (2 i + 1) f_j / (2 n))

    Columns are orthogonal, and their length is sqrt(n / k): independent entries would
    lose more where k is not far below n. Omega stays the same up to the next renewal of
    the basis, so that sketches of several gradients can be added up.

    Args:
        projector: Projector of the leaf.
        subspace: Subspace of the leaf.
        width: k, at most n.

    References:
        Tropp, `Improved analysis of the subsampled randomized Hadamard transform
        <https://arxiv.org/abs/1011.1595>`_, 2011, with a cosine transform.
    """
    seeds = projector.seeds(subspace.refreshes, projector.name_hash)
    n = projector.view.kept_size
    # Draws unlike those that a basis rule makes with the same seed.
    signs, order = (
        hashed_uniform(hashed(seeds ^ own), (n, 1), jnp.float32)[..., 0]
        for own in (0x5BD1E995, 0x1B873593)
    )
    frequencies = jnp.argsort(order, axis=-1)[..., None, :width].astype(jnp.uint32)
    rows = jnp.arange(n, dtype=jnp.uint32)[:, None]
    angles = _product_modulo(2 * rows + 1, frequencies, 4 * n)
    cosines = jnp.cos(angles.astype(projector.dtype) * (math.pi / (2 * n)))
    lengths = jnp.where(frequencies == 0, 0.5, 1.0) * (2 / width)
    return cosines * jnp.sign(signs)[..., None] * jnp.sqrt(lengths)


def _product_modulo(first: jax.Array, second: jax.Array, modulus: int) -> jax.Array:
    """Returns first * second modulo a number, uint32: whole turns of an angle.

    It is exact for factors up to 2^20 and 2^19 and a modulus up to 2^21.
    """
    high, low = second >> 9, second & 511
    return (((first * high % modulus) << 9) + first * low) % modulus


def sketch_beside(leaf: Any, projector: Projector, width: int) -> jax.Array:
    """Returns zeros like the rows of a sketch, with the leaf's sharding."""
    view = projector.view
    *stack, side, never = basis_axes(view)
    shape = (*view.stack, width, view.projected_size)
    return zeros_beside(leaf, shape, projector.dtype, (*stack, never, side))
