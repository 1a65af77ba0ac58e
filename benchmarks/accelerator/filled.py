"""Arrays filled with numbers without a random generator, which would take memory.

Products of zeros draw less power, and an accelerator runs such products faster. Times
are therefore taken on filled arrays.
"""

import functools
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

_MOMENTS_AND_BASES = re.compile(r"\.(mu|nu|trace|basis|projector)\b")
_COUNTERS = re.compile(r"\.(count|refreshes)\b")
_SCALE = 0.02  # of moments, and of the columns of a basis


def noise(shape: tuple[int, ...], seed: jax.typing.ArrayLike) -> jax.Array:
    """Returns float32 numbers as if uniform on (-1, 1), hashes of their positions."""
    bits = _bits(shape, seed)
    return (bits >> 8).astype(jnp.float32) / 2**23 - 1


def gradient(shape: tuple[int, int, int], seed: jax.Array) -> jax.Array:
    """Returns (layers, n, m) with singular values that fall as i^-1 over noise."""
    layers, n, m = shape
    count = min(n, m)
    u = noise((layers, n, count), seed) / jnp.arange(1, count + 1)
    v = noise((layers, count, m), seed + 1)
    return (u @ v) / (n * m) ** 0.5 + noise(shape, seed + 2) / (100 * max(n, m) ** 0.5)


def params_like(shapes: Any, seed: jax.Array) -> Any:
    """Returns parameters of a LLaMA with these shapes and dtypes; norm scales are 1."""

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(shape.shape, shape.dtype)
        values = 0.03 * noise(shape.shape, seed + _number(name))
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def state_like(tx: optax.GradientTransformation, params: Any, seed: jax.Array) -> Any:
    """Returns a state of ``tx`` as after an update, with filled moments and bases."""
    fill = functools.partial(_filled, seed)
    return jax.tree_util.tree_map_with_path(fill, tx.init(params))


def tokens(shape: tuple[int, int], vocabulary: int) -> jax.Array:
    """Returns int32 in [0, vocabulary)."""
    return (_bits(shape, 0) % jnp.uint32(vocabulary)).astype(jnp.int32)


def _filled(seed: jax.Array, path: tuple, leaf: Any) -> jax.Array:
    name = jax.tree_util.keystr(path)
    seed = seed + _number(name)
    if _COUNTERS.search(name):
        return jnp.ones_like(leaf)
    if not _MOMENTS_AND_BASES.search(name) or leaf.ndim < 2:
        return leaf
    if name.endswith(".codes"):
        # No code of these is "not a number" in any of the formats.
        masks = {"int8": 0x7F, "uint8": 0x7F, "uint16": 0x7777}
        return (_bits(leaf.shape, seed) & masks[str(leaf.dtype)]).astype(leaf.dtype)
    values = _SCALE * noise(leaf.shape, seed)
    if ".nu" in name or name.endswith(".absmax"):
        values = jnp.square(values) + 1e-4
    return values.astype(leaf.dtype)


def _number(name: str) -> jax.Array:
    return jnp.uint32(zlib.crc32(name.encode()))


def _bits(shape: tuple[int, ...], seed: jax.typing.ArrayLike) -> jax.Array:
    """Returns 32 mixed bits for each position of an array (murmur3's last step)."""
    start = jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9)
    index = jnp.broadcast_to(start, shape)
    stride = 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += place * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    return index ^ (index >> 16)
