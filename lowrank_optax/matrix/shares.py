"""Stacks of matrices shared out over the mesh, whole matrices to each device.

Newton-Schulz on matrices with a sharded side adds up a product over the devices at each
iteration. On matrices that every device has, all devices do the same work. Shared out,
the work has one redistribution of the stack before it and one after it, whatever the
number of matrices and of iterations.

The mesh is ``jax.sharding.get_abstract_mesh()``: compile under ``jax.set_mesh(mesh)``.
Without a mesh, on one device, outside ``jax.jit`` and inside ``shard_map`` the program
stays as it is.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

MOST_PADDING = 2  # as a factor on the stack's length


class Split(NamedTuple):
    """How a stack is shared out.

    Attributes:
        axis: The axis of the stack that is cut.
        names: The mesh's axes that it is cut over.
        padded: Its length with padding.
    """

    axis: int
    names: tuple[str, ...]
    padded: int


def is_shared(leaf: jax.Array, stack: tuple[int, ...]) -> bool:
    """Returns whether :func:`in_shares` shares out a leaf's matrices (*stack, n, m)."""
    return split_of(stack, _mesh_of(leaf)) is not None


def in_shares(
    function: Callable[[jax.Array], jax.Array],
    matrices: jax.Array,
    to_all: bool = False,
) -> jax.Array:
    """Returns function(matrices), computed by each device for its share of the stack.

    :func:`split_of` chooses the axis of the stack and the axes of the mesh.

    What moves, for a stack of s matrices n x m over d devices: if a side is sharded
    over all devices, each device sends s n m / d numbers before the work and as many
    after it. If every device has the operand, nothing moves before, and s n m numbers
    are gathered after. Each device runs the function on s / d matrices.

    It does not always pay. Five Newton-Schulz iterations are 20 to 30 flops on each
    number for each row of the shorter side, so on an operand that every device has and
    with a shorter side under some hundreds, the gathering may take longer than the
    work. A stack that is sharded over its own axis is gathered first, which costs more
    than it saves: compile such a program without ``jax.set_mesh``.

    Args:
        function: A function (*stack, n, m) -> (*stack, k, l), matrix by matrix.
        matrices: Stack of matrices; (*stack, n, m).
        to_all: Whether all devices get the whole result. Otherwise it has the sharding
            that its users ask for.
    """
    split = split_of(matrices.shape[:-2], _mesh_of(matrices))
    if split is None:
        return function(matrices)
    axis, names, padded = split
    # Without it the compiler would use the constrained array wherever this one is used.
    matrices = jax.lax.optimization_barrier(matrices)
    # A constraint's None stops the compiler from cutting up what comes before and after
    # along the stack too: gradients, moments, updates. One axis of the mesh at a time,
    # because the compiler gathers where it has to move several.
    matrices = _cut(matrices, axis, ())
    length, padding = matrices.shape[axis], [(0, 0)] * matrices.ndim
    padding[axis] = (0, padded - length)
    matrices = jnp.pad(matrices, padding)
    for count in range(len(names)):
        matrices = _cut(matrices, axis, names[:count])
    result = function(_cut(matrices, axis, names, whole=True))
    result = _cut(result, axis, names, whole=True)
    if to_all:
        result = jax.lax.with_sharding_constraint(result, P(*[None] * result.ndim))
        return jax.lax.slice_in_dim(result, 0, length, axis=axis)
    for count in reversed(range(len(names))):
        result = _cut(result, axis, names[:count])
    return jax.lax.slice_in_dim(result, 0, length, axis=axis)


def _cut(
    stack: jax.Array, axis: int, names: tuple[str, ...], whole: bool = False
) -> jax.Array:
    """Returns a stack cut over axes of the mesh, with whole matrices if asked for.

    The compiler shards the other axes as it likes.
    """
    spec: list[Any] = [P.UNCONSTRAINED] * stack.ndim
    spec[axis] = names or None
    if whole:
        spec[-2:] = [None, None]
    return jax.lax.with_sharding_constraint(stack, P(*spec))


def _mesh_of(leaf: jax.Array) -> Mapping[str, int]:
    """Returns the lengths of the mesh's axes; {} where the program stays as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    is_automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh.shape if is_automatic and isinstance(leaf, Tracer) else {}


def split_of(stack: tuple[int, ...], mesh: Mapping[str, int]) -> Split | None:
    """Returns the split that leaves each device the fewest matrices; None for no split.

    Where the devices do not divide the length, the stack is padded by matrices of
    zeros, to twice its length at most. Between equal splits the one over fewer axes of
    the mesh is chosen, then that over later ones: a side of a matrix is sharded over
    one of the later axes as a rule, and over the first one the batch alone.

    Args:
        stack: Shape of the stack.
        mesh: Name of each axis -> length.
    """
    names = [name for name in reversed(tuple(mesh)) if mesh[name] > 1]
    best, chosen = math.prod(stack), None
    for axis, length in enumerate(stack):
        for subset in _subsets(names):
            devices = math.prod(mesh[name] for name in subset)
            padded = -(-length // devices) * devices
            share = math.prod(stack[:axis] + stack[axis + 1 :]) * padded // devices
            if share < best and padded <= MOST_PADDING * length:
                best, chosen = share, Split(axis, subset[::-1], padded)
    return chosen


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Returns the tuples of names, the short ones first."""
    for count in range(1, len(names) + 1):
        yield from itertools.combinations(names, count)
