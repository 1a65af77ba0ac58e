"""Shapes, dtypes and shardings of trees, to tell compiled programs apart."""

from typing import Any

import jax
from jax.sharding import NamedSharding


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """Returns structure, shapes, dtypes and shardings of a tree, to be compared.

    Args:
        tree: Arrays, numbers, or shapes (``jax.ShapeDtypeStruct``).
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(_shape_of(leaf) for leaf in leaves)


def _shape_of(leaf: Any) -> tuple[Any, ...]:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        place = (sharding.spec, sharding.mesh, sharding.memory_kind)
    else:
        place = None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, False, place
    kind = jax.typeof(leaf)
    return kind.shape, kind.dtype, kind.weak_type, place
