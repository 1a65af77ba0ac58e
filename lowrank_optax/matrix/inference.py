"""The axes of each leaf's matrix, inferred from names, boxes and shapes."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lowrank_optax.matrix.boxes import leaves_by_path, unboxed
from lowrank_optax.matrix.dimension_numbers import LowRankDimensionNumbers
from lowrank_optax.matrix.names import (
    InAttention,
    Leaf,
    head_axes_by_name,
    is_bias,
    is_convolution,
    is_embedding,
    is_norm,
    is_output_first,
    named_leaves,
)
from lowrank_optax.matrix.stacks import Modules, ScanAxis, stack_axes


class Inferred(NamedTuple):
    """What the library infers about a leaf.

    Attributes:
        numbers: Axes of the leaf's matrix; None, if the leaf has no matrix.
        reason: Why the leaf has no matrix; empty, if it has one.
    """

    numbers: LowRankDimensionNumbers | None
    reason: str = ""


def dimension_numbers_by_name(params: Any, scan_axis: ScanAxis | None = None) -> Any:
    """Returns the default dimension numbers of every leaf, a tree like ``params``.

    A matrix is input x output. These leaves are recognised; any other leaf is a stack
    of matrices, each of the last two axes:

    - Norms and biases (by name), vectors, and stacks of vectors get None.
    - Layers that are stacked for a scan are a stack over the layer axis, at whatever
      position. The layer axis is named by a box (``layers``), given by ``scan_axis``,
      or shown by the shapes: in a scanned module this axis has one length in all
      leaves, norms too.
    - Attention kernels are recognised by name (``query``, ``k_proj``, ``kv_einsum``,
      ``o_proj``, ...), beside one another or in a module named attention. (d, heads,
      width) and (heads, d, width) are d x (heads width); (heads, width, d) is (heads
      width) x d. Queries, keys and values in one leaf are a stack.
    - Where a box names axes of heads, these axes together are one side.
    - Convolutions (by name) are (all other axes) x output.

    :func:`lowrank_optax.projections` lists the decisions. To change a decision, change
    an entry of the result, for instance with ``jax.tree_util.tree_map_with_path``, and
    pass the result as ``dimension_numbers``. Inside ``optax.masked`` and
    ``optax.partition`` a smaller tree shows less: give ``scan_axis`` there.

    Args:
        params: Tree of arrays or shapes.
        scan_axis: Axis of stacked layers in every leaf under a name like ``layers``,
            ``blocks``, ``stack`` or ``scan``; or {regular expression: axis} for the
            leaves whose key path matches. None: the axis that boxes and shapes show.

    Returns:
        A tree like ``params``, without boxes, of :class:`LowRankDimensionNumbers` or
        None.

    Raises:
        ValueError: If ``scan_axis`` cannot be the axis of stacked layers.

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
    """Returns what the library infers about each leaf, by key path."""
    modules = Modules(named_leaves(params))
    stacks = stack_axes(modules, scan_axis)
    return {
        leaf.path: _of_leaf(leaf, stacks[leaf.path], modules) for leaf in modules.leaves
    }


_model: contextvars.ContextVar[dict[tuple, Inferred] | None] = contextvars.ContextVar(
    "lowrank_optax_model", default=None
)


@contextlib.contextmanager
def seen_in(params: Any) -> Iterator[None]:
    """Shows a part of a model, inside the context, as in the whole model.

    A partition hides the neighbours of a leaf, but the neighbours show the layer axis.

    Args:
        params: The whole model.
    """
    token = _model.set(inferred(params))
    try:
        yield
    finally:
        _model.reset(token)


def is_in_model() -> bool:
    """Returns whether the context shows a whole model; see :func:`seen_in`."""
    return _model.get() is not None


def inferred_in_model(params: Any) -> dict[tuple, Inferred]:
    """Returns the inference about each leaf, from the whole model where it is known.

    Args:
        params: The model, or a part of it; see :func:`seen_in`.
    """
    model, paths = _model.get(), leaves_by_path(params).keys()
    if model is not None and paths <= model.keys():
        return {path: model[path] for path in paths}
    return inferred(params)


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
    rows, columns = rest[-2:]
    # A table of tokens begins with its input everywhere.
    if is_output_first(leaf) and not is_embedding(leaf):
        rows, columns = columns, rows
    return Inferred(LowRankDimensionNumbers(rows, columns))


def _split(rest: list[int], heads: set[int]) -> LowRankDimensionNumbers:
    """Returns the heads as one side, the other axes as the other; rows come first."""
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
        # The input axis is as long as the attention's output, if only one axis is.
        found = [axis for axis in axes if leaf.shape[axis] in returned]
        return found[0] if len(found) == 1 else default

    one = list(rest)
    if kernel.fused > 1:
        several = [axis for axis in rest[:-1] if leaf.shape[axis] == kernel.fused]
        one = [axis for axis in rest if axis not in several[:1]]
    elif len(rest) > 3:
        # One axis is of layers, and nothing else shows which: the shorter one.
        longest = max(rest[:2], key=lambda axis: leaf.shape[axis])
        one = [inputs(rest[:2], longest), *rest[2:]]
    axis = inputs(one[:-1], one[kernel.heads_first])
    return LowRankDimensionNumbers(axis, tuple(k for k in one if k != axis))
