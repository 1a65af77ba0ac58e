"""Leaves as arrays: their names, shapes and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Returns the dtype of sums and of linear algebra: float32, or a wider one."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    # promote_types raises for floats of 8 bits.
    wider = jnp.float32 if is_narrow else jnp.promote_types(dtype, jnp.float32)
    return jax.dtypes.canonicalize_dtype(wider)


def blank(dtype: Any) -> int:
    """Returns what a column out of use holds: 0, or -1 as the number of no column."""
    return -1 if jnp.issubdtype(dtype, jnp.integer) else 0


def struct_of(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a leaf in JAX, which may have no float64."""
    # A key of jax.random has a dtype that is not NumPy's.
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def leaf_name(path: tuple) -> str:
    """Returns how messages and results call a leaf: its key path."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def as_arrays(tree: Any) -> Any:
    """Returns a tree whose leaves have a shape and a dtype. Numbers become arrays.

    Args:
        tree: Parameters, gradients, or their shapes; Python numbers among them.

    Raises:
        TypeError: If a leaf is neither an array nor a number.
    """

    def of_leaf(path, leaf):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return leaf
        if isinstance(leaf, (bool, int, float, complex)):
            return jnp.asarray(leaf)
        raise TypeError(
            f"{leaf_name(path)} is no array but {type(leaf).__name__}; give the "
            "optimizer the arrays of a model alone, such as equinox.filter(model, "
            "equinox.is_inexact_array)."
        )

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
