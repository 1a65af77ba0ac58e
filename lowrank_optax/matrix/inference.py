"""Which axes of a leaf form its matrix, as names, boxes and shapes say."""

from typing import Any, NamedTuple

import jax

from lowrank_optax.matrix.boxes import unboxed
from lowrank_optax.matrix.dimension_numbers import LowRankDimensionNumbers
from lowrank_optax.matrix.names import (
    InAttention,
    Leaf,
    head_axes_by_name,
    is_bias,
    is_convolution,
    is_norm,
    is_output_first,
    named_leaves,
)
from lowrank_optax.matrix.stacks import Modules, ScanAxis, stack_axes


class Inferred(NamedTuple):
    """What is inferred of a leaf.

    Attributes:
        numbers: Axes of its matrix; None, if it has none.
        reason: Why, if it has none.
    """

    numbers: LowRankDimensionNumbers | None
    reason: str = ""


def dimension_numbers_by_name(params: Any, scan_axis: ScanAxis | None = None) -> Any:
    """Returns the default dimension numbers of every leaf, a tree like ``params``.

    A matrix is input x output. What is neither of these is a stack of the matrices of
    its last two axes:

    - Norms and biases, by their names, vectors, and stacks of vectors: None.
    - Layers that were stacked to be scanned: a stack over their axis, wherever it is. A
      box says so of its axis (``layers``); ``scan_axis`` does; or the leaves show it:
      in a scanned module all have that length at that axis, norms too.
    - Kernels of attention, which are known by their names (``query``, ``k_proj``,
      ``kv_einsum``, ``o_proj``, ...) beside one another or in an attention: (d, heads,
      width) and (heads, d, width) are d x (heads width), (heads, width, d) is (heads
      width) x d. Keys, values and queries in one leaf are a stack.
    - Leaves whose boxes name the axes of heads: those together are one side.
    - Convolutions, by their names: everything but the output x output.

    :func:`lowrank_optax.projections` says what comes out. Change single entries of the
    result, with ``jax.tree_util.tree_map_with_path`` for instance, and hand it on as
    ``dimension_numbers``. A tree that ``optax.masked`` or ``optax.partition`` has made
    smaller shows less: say ``scan_axis`` there.

    Args:
        params: Tree of arrays or shapes.
        scan_axis: Axis of stacked layers, of every leaf under a name like ``layers``,
            ``blocks``, ``stack`` or ``scan``; or {regular expression: axis} of the
            leaves whose key path it finds. None: as boxes say and leaves show.

    Returns:
        A tree like ``params``, without boxes, of :class:`LowRankDimensionNumbers` or
        None.

    Raises:
        ValueError: If ``scan_axis`` names an axis that is none of layers.

    Example:
        >>> import functools, jax.numpy as jnp, lowrank_optax
        >>> params = {"layers": {"up": {"kernel": jnp.ones((64, 3, 256))},
        ...                      "norm": {"scale": jnp.ones((64, 3))}}}
        >>> dimension_numbers_by_name(params)["layers"]["up"]["kernel"]
        LowRankDimensionNumbers(reduction_axis=0, output_axis=2)
        >>> said = functools.partial(dimension_numbers_by_name, scan_axis=1)
        >>> tx = lowrank_optax.galore(1e-3, rank=8, dimension_numbers=said)
    """
    found = inferred(params, scan_axis)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: found[path].numbers, unboxed(params)
    )


def inferred(params: Any, scan_axis: ScanAxis | None = None) -> dict[tuple, Inferred]:
    """Returns what is inferred of each leaf by its key path."""
    modules = Modules(named_leaves(params))
    stacks = stack_axes(modules, scan_axis)
    return {
        leaf.path: _of_leaf(leaf, stacks[leaf.path], modules) for leaf in modules.leaves
    }


def _of_leaf(leaf: Leaf, stack: tuple[int, ...], modules: Modules) -> Inferred:
    rest = [axis for axis in range(len(leaf.shape)) if axis not in stack]
    if len(leaf.shape) < 2:
        return Inferred(None, "fewer than two axes")
    if is_norm(leaf) or is_bias(leaf, modules.inside[leaf.keys[:-1]]):
        return Inferred(None, "a norm or a bias by its name")
    if len(rest) < 2:
        return Inferred(None, "a stack of vectors")
    heads = set(head_axes_by_name(leaf))
    if len(rest) > 2 and 0 < len(heads) < len(rest):
        return Inferred(_split(rest, heads))
    kernel = modules.attention(leaf)
    if len(rest) > 2 and is_convolution(leaf):
        output = rest[0] if is_output_first(leaf) else rest[-1]
        inputs = tuple(axis for axis in rest if axis != output)
        return Inferred(LowRankDimensionNumbers(inputs, output))
    if len(rest) > 2 and kernel and (stack or modules.has_heads(leaf, kernel)):
        return Inferred(_of_attention(leaf, rest, kernel, modules))
    return Inferred(LowRankDimensionNumbers(rest[-2], rest[-1]))


def _split(rest: list[int], heads: set[int]) -> LowRankDimensionNumbers:
    """Returns axes as heads and the others, the side that comes first as rows."""
    one = tuple(axis for axis in rest if axis in heads)
    other = tuple(axis for axis in rest if axis not in heads)
    return LowRankDimensionNumbers(*sorted([one, other]))


def _of_attention(
    leaf: Leaf, rest: list[int], kernel: InAttention, modules: Modules
) -> LowRankDimensionNumbers:
    if kernel.kind == "out":
        head, width, output = rest[-3:]
        return LowRankDimensionNumbers((head, width), output)
    returned = modules.returned(kernel.module)

    def inputs(axes, default):
        # They are as long as what attention returns, if one axis alone is.
        found = [axis for axis in axes if leaf.shape[axis] in returned]
        return found[0] if len(found) == 1 else default

    one = list(rest)
    if kernel.fused > 1:
        several = [axis for axis in rest[:-1] if leaf.shape[axis] == kernel.fused]
        one = [axis for axis in rest if axis not in several[:1]]
    elif len(rest) > 3:
        # Layers that nothing else shows: there are fewer than there are inputs.
        longest = max(rest[:2], key=lambda axis: leaf.shape[axis])
        one = [inputs(rest[:2], longest), *rest[2:]]
    axis = inputs(one[:-1], one[kernel.heads_first])
    return LowRankDimensionNumbers(axis, tuple(k for k in one if k != axis))
