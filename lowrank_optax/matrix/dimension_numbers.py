"""Which axes of a leaf form its matrix: as the user says, or by its shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lowrank_optax.matrix.boxes import unboxed


class LowRankDimensionNumbers(NamedTuple):
    """Which axes of a leaf form its matrix; the axes not named are stack axes.

    Attributes:
        reduction_axis: Axis or axes of the rows (the input of a kernel).
        output_axis: Axis or axes of the columns (the output of a kernel).

    Example:
        An attention kernel (embed, heads, head_dim), as embed x (heads * head_dim):

        >>> LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
        LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


DimensionNumbers = Any | Callable[[Any], Any]
"""A tree like the parameters, of LowRankDimensionNumbers or optax's
MuonDimensionNumbers (None: the leaf stays at full size); or a function from the
parameters to such a tree."""


def is_numbers(node: Any) -> bool:
    """Returns whether a node is dimension numbers, this library's or optax's."""
    kinds = (LowRankDimensionNumbers, optax.contrib.MuonDimensionNumbers)
    return isinstance(node, kinds)


def numbers_by_path(
    dimension_numbers: DimensionNumbers, params: Any
) -> dict[tuple, LowRankDimensionNumbers | None]:
    """Returns the user's dimension numbers of each leaf, by key path.

    Raises:
        ValueError: If a leaf of the tree is neither dimension numbers nor None.
    """
    # An Equinox module of numbers is a tree, even if it is callable: do not call it.
    leaves = jax.tree.leaves(dimension_numbers, is_leaf=is_numbers)
    if callable(dimension_numbers) and leaves and not any(map(is_numbers, leaves)):
        dimension_numbers = dimension_numbers(params)

    def read(path, leaf):
        if leaf is None or isinstance(leaf, LowRankDimensionNumbers):
            return leaf
        if is_numbers(leaf):
            return LowRankDimensionNumbers(leaf.reduction_axis, leaf.output_axis)
        raise ValueError(
            f"dimension_numbers{jax.tree_util.keystr(path)} must be "
            "LowRankDimensionNumbers, optax.contrib.MuonDimensionNumbers or None, "
            f"got {leaf!r}."
        )

    found = jax.tree.leaves_with_path(
        unboxed(dimension_numbers), is_leaf=lambda x: x is None or is_numbers(x)
    )
    return {path: read(path, leaf) for path, leaf in found}


def dimension_numbers_by_shape(params: Any) -> Any:
    """Returns dimension numbers by the number of axes alone, a tree like ``params``.

    A leaf of two axes is one matrix. A leaf of more axes is a stack of matrices, each
    of the last two axes. Vectors and scalars get None and stay at full size. The
    default of all methods is :func:`lowrank_optax.dimension_numbers_by_name`, which
    also knows the layouts of attention kernels, convolutions and scanned layers.

    Args:
        params: Tree of arrays or shapes.

    Returns:
        A tree like ``params``, without boxes, of :class:`LowRankDimensionNumbers` or
        None.

    Example:
        >>> import jax.numpy as jnp
        >>> dimension_numbers_by_shape({"scan": jnp.ones((8, 4, 6)), "b": jnp.ones(6)})
        {'b': None, 'scan': LowRankDimensionNumbers(reduction_axis=1, output_axis=2)}
    """
    return jax.tree.map(_by_shape, unboxed(params))


def _by_shape(leaf) -> LowRankDimensionNumbers | None:
    axes = np.ndim(leaf)
    return LowRankDimensionNumbers(axes - 2, axes - 1) if axes >= 2 else None
