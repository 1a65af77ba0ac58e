"""Products of a gradient with the rows of a future basis.

Bases are stored as rows here, see :mod:`lowrank_optax.rules.orthonormal`. A is the last
operand, in its own layout, so that only small matrices are transposed.
"""

import jax
import jax.numpy as jnp

from lowrank_optax.rules.orthonormal import HIGHEST

# Largest entry of Q Q^T - I between two products, where no direction may be lost.
NEARLY = 3e-2


def image_rows(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns (A rows^T)^T, (*stack, k, a), for rows (*stack, k, b)."""
    return jnp.einsum("...kb,...ab->...ka", rows, matrix, precision=HIGHEST)


def sketch_rows(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows A, (*stack, k, b), for rows (*stack, k, a)."""
    return jnp.einsum("...ka,...ab->...kb", rows, matrix, precision=HIGHEST)


def scaled(x: jax.Array) -> jax.Array:
    """Returns X with 1 as the largest |entry| of each matrix, and 0 where not finite.

    The squares then neither overflow nor underflow. Decompositions may hang on NaN.
    """
    x = jnp.where(jnp.isfinite(x), x, 0)
    peak = jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True)
    return x / jnp.where(peak > 0, peak, 1)


def is_usable(x: jax.Array) -> jax.Array:
    """Returns whether each matrix is finite and not zero, (*stack, 1, 1)."""
    is_finite = jnp.all(jnp.isfinite(x), axis=(-1, -2), keepdims=True)
    return is_finite & jnp.any(x != 0, axis=(-1, -2), keepdims=True)
