"""Random numbers that are hashes of their places: cheap, and the same on any mesh.

For sketches and fresh directions, of which nothing is asked but to be in no relation to
a gradient. Bases that are random themselves are drawn by ``jax.random``.
"""

import jax
import jax.numpy as jnp


def hashed(words: jax.Array) -> jax.Array:
    """Returns a hash of each word, uint32: a bijection in which each bit counts."""
    # The constants of C. Wellons' search for one with little bias, "lowbias32", 2018.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def hashed_uniform(start: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Returns matrices uniform on (-1, 1), one per start; (*start.shape, *shape).

    Args:
        start: uint32; the same one gives the same matrix.
        shape: Rows and columns.
        dtype: Of the result.
    """
    full = (*start.shape, *shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 2)
    columns = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 1)
    # Three rounds: rows of one matrix, and matrices of close starts, have no relation.
    words = hashed(hashed(hashed(start)[..., None, None] + rows) + columns)
    return (2 * (words >> 8).astype(dtype) + 1) / 2**24 - 1
