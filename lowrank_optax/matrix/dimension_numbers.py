"""Which axes of a leaf form its matrix: as the user says, or by its shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

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
"""A tree like the parameters of LowRankDimensionNumbers (None: leave the leaf at full
size), or a function that makes one from the parameters."""


def dimension_numbers_by_shape(params: Any) -> Any:
    """Returns the default dimension numbers of every leaf, a tree like ``params``.

    A matrix is itself; a leaf of more axes is a stack of its last two; vectors and
    scalars get None and stay at full size. Change single entries of the result, with
    ``jax.tree_util.tree_map_with_path`` for instance, and hand it on as
    ``dimension_numbers``.

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
