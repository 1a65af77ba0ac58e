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


# The golden ratio's share of 2^32.
GOLDEN = 0x9E3779B9


def dither(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    r"""Returns numbers d uniform on [0, 1) for rounding, floor(x + d).

    A number is a hash of its place, turned on by the seed. Seeds that follow one
    another by ``GOLDEN`` make each place's numbers a Weyl sequence of the golden ratio,
    the most even one: of n numbers in a row n p are below p, to within about log n and
    not only sqrt(n p). What moves by a small part p of a step at each of n roundings
    has then moved by n p steps, nearly without noise.

    Args:
        seed: (*stack,), uint32.
        shape: Rows and columns.

    Returns:
        (*stack, rows, columns), float32: of place and seed alone, whatever the shape.
    """
    full = (*seed.shape, *shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 2)
    columns = jax.lax.broadcasted_iota(jnp.uint32, full, len(full) - 1)
    # Odd factors without a small multiple in common: places do not collide.
    places = rows * jnp.uint32(0xD1B54A33) + columns * jnp.uint32(0xC13FA9A9)
    words = hashed(places) + seed[..., None, None]
    return (words >> 8).astype(jnp.float32) / 2**24
