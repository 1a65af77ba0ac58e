"""Products of a gradient with rows that are to become a basis.

Bases are held as rows in here: see orthonormal. A stands last and in its own layout, so
that only small matrices are transposed.
"""

import jax
import jax.numpy as jnp

from lowrank_optax.rules.orthonormal import HIGHEST

# How far Q Q^T may be from I between two products: what counts there is that no
# direction is lost to rounding.
NEARLY = 3e-2


def image_rows(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns (A rows^T)^T, (*stack, k, a), for rows (*stack, k, b)."""
    return jnp.einsum("...kb,...ab->...ka", rows, matrix, precision=HIGHEST)


def sketch_rows(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows A, (*stack, k, b), for rows (*stack, k, a)."""
    return jnp.einsum("...ka,...ab->...kb", rows, matrix, precision=HIGHEST)


def scaled(x: jax.Array) -> jax.Array:
    """Returns matrices X, the largest |entry| of each 1, with 0 for what is not finite.

    Squares then neither overflow nor underflow; decompositions may hang on NaN.
    """
    x = jnp.where(jnp.isfinite(x), x, 0)
    peak = jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True)
    return x / jnp.where(peak > 0, peak, 1)


def is_usable(x: jax.Array) -> jax.Array:
    """Returns whether each matrix is finite and not zero, (*stack, 1, 1)."""
    is_finite = jnp.all(jnp.isfinite(x), axis=(-1, -2), keepdims=True)
    return is_finite & jnp.any(x != 0, axis=(-1, -2), keepdims=True)
