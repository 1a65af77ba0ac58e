"""Shapes, dtypes and shardings of trees, to tell compiled programs apart."""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """Returns structure, shapes, dtypes and shardings of a tree, to be compared.

    Args:
        tree: Arrays, numbers, or shapes (``jax.ShapeDtypeStruct``).
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(_shape_of(leaf) for leaf in leaves)


class Difference(NamedTuple):
    """Where two trees have other shapes first.

    Attributes:
        path: Key path; (): their structures differ.
        told: New and old shape, dtype and sharding, in words.
        is_of_size: Whether the shapes differ, and not only dtype or sharding.
    """

    path: tuple[Any, ...]
    told: str
    is_of_size: bool


def first_difference(tree: Any, before: tuple[Any, ...]) -> Difference:
    """Returns where a tree differs from earlier :func:`shapes_of`, which it does."""
    structure, shapes = shapes_of(tree)
    if structure == before[0]:
        paths = (path for path, _ in jax.tree.leaves_with_path(tree))
        for path, new, old in zip(paths, shapes, before[1], strict=True):
            if new != old:
                told = f"{_told(*new)} after {_told(*old)}"
                return Difference(path, told, new[0] != old[0])
    return Difference((), "another structure", False)


def _told(shape: tuple[int, ...], dtype: Any, is_weak: bool, place: Any) -> str:
    words = [f"{dtype}{list(shape)}"]
    words += ["of a Python number"] if is_weak else []
    words += [f"as {place[0]}"] if place else []
    return " ".join(words)


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
