"""State arrays in few bits, with the shardings and boxes of the float arrays."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from lowrank_optax.codes import Coded, coded_record, decode, encode, is_coded
from lowrank_optax.matrix.boxes import boxed_like, contents, unboxed, with_contents
from lowrank_optax.matrix.sharding import zeros_beside
from lowrank_optax.rules.hashing import hashed


def decoded(node: Any) -> Any:
    """Returns a coded array decoded, in its box; any other node as it is."""
    if not is_coded(node):
        return node
    coded = coded_record(node)
    return with_contents(coded.codes, decode(unboxed(coded)))


def encoded(old: Any, new: Any) -> Any:
    """Returns the new array in the format of the old one."""
    if not is_coded(old):
        return new
    coded = coded_record(old)
    return boxed_like(encode(contents(new), unboxed(coded)), coded)


def first_encoded(leaf: Any, like: Coded, seed: int) -> Coded:
    """Returns an array in a format, with the array's sharding and box.

    Args:
        leaf: The array.
        like: Shapes in the format.
        seed: Seed of the array; each matrix of the stack gets its own seed from it.
    """
    array = contents(leaf)
    axes = tuple((axis,) for axis in range(array.ndim))
    is_packed = like.codes.shape != array.shape
    codes_axes = (*axes[:-1], ()) if is_packed else axes
    seeds = ()
    if jax.tree.leaves(like.seed):
        stack = like.seed.shape
        places = jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
        box = zeros_beside(leaf, stack, jnp.uint32, axes[:-2])
        seeds = contents(box) + hashed(places + jnp.uint32(seed))
        seeds = with_contents(box, seeds)
    zeros = Coded(
        zeros_beside(leaf, like.codes.shape, like.codes.dtype, codes_axes),
        zeros_beside(leaf, like.absmax.shape, like.absmax.dtype, axes),
        seeds,
    )
    # Jitted: eagerly, each of its twenty operations would be a program. The barrier
    # keeps XLA from folding the codes of zeros at compile time, which takes minutes.
    empty = unboxed(zeros)
    coded = jax.jit(encode)(*jax.lax.optimization_barrier((array, empty)))
    if not isinstance(array, Tracer) and isinstance(array.sharding, NamedSharding):
        coded = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), coded, empty)
    return boxed_like(coded, zeros)
