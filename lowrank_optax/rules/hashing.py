"""Random numbers as hashes of their positions: cheap, and the same on any mesh.

They serve for sketches and fresh directions, which must only be unrelated to the
gradient. Random bases are drawn by ``jax.random``.
"""

import jax
import jax.numpy as jnp

from lowrank_optax.checks import is_known


def hashed(words: jax.Array) -> jax.Array:
    """Returns a hash of each word, uint32: a bijection that depends on every bit."""
    # Constants of C. Wellons' "lowbias32", 2018, found by a search for little bias.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def hashed_seed(seed: jax.typing.ArrayLike) -> jax.Array:
    """Returns the hash of a user's seed, modulo 2^32; an int of any size, or traced."""
    if is_known(seed):
        return hashed(jnp.uint32(int(seed) % 2**32))
    return hashed(jnp.asarray(seed).astype(jnp.uint32))


def hashed_uniform(start: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Returns matrices uniform on (-1, 1), one per start; (*start.shape, *shape).

    Args:
        start: uint32; equal starts give equal matrices.
        shape: Rows and columns.
        dtype: Dtype of the result.
    """
    full = (*start.shape, *shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 2)
    columns = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 1)
    # Three rounds: rows of a matrix, and matrices of close starts, are unrelated.
    words = hashed(hashed(hashed(start)[..., None, None] + rows) + columns)
    return (2 * (words >> 8).astype(dtype) + 1) / 2**24 - 1


# 2^32 divided by the golden ratio.
GOLDEN = 0x9E3779B9


def dither(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    r"""Returns numbers d uniform on [0, 1) for rounding, floor(x + d).

    A number is (hash of its position + seed) / 2^32, modulo 1. If each seed is the last
    seed plus ``GOLDEN``, the numbers at a position form a Weyl sequence of the golden
    ratio, the most even sequence. Among n successive numbers, n p lie below p, up to
    about log n; independent draws deviate by sqrt(n p). Take a value that grows by a
    small part p of a step at each of n roundings. Its code grows by n p steps, nearly
    without noise.

    Args:
        seed: (*stack,), uint32.
        shape: Rows and columns.

    Returns:
        (*stack, rows, columns), float32. Each number depends on its position and the
        seed alone, not on the shape.
    """
    full = (*seed.shape, *shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 2)
    columns = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 1)
    # Odd factors without a small common multiple: positions do not collide.
    places = rows * jnp.uint32(0xD1B54A33) + columns * jnp.uint32(0xC13FA9A9)
    words = hashed(places) + seed[..., None, None]
    return (words >> 8).astype(jnp.float32) / 2**24
