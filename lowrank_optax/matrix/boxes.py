"""Boxes: pytree nodes of one array, on which frameworks write the names of its axes.

``flax.nnx.Variable``, Linen's ``Partitioned`` and ``LogicallyPartitioned``, and
Haliax's ``NamedArray``. They are known by their methods, so that no framework is
imported. What the library computes sees the arrays inside. Each array of a state that
stands beside a boxed leaf has a box of its own, with the names of the leaf's axes that
it is made of.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# For each axis of an array, the axes of a leaf that are merged in it.
Axes = Sequence[Sequence[int]]

# What NNX calls the names of axes, or the sharding that they are of.
_NAMES = ("optimizer_sharding", "out_sharding", "sharding", "sharding_names")


def is_box(node: Any) -> bool:
    """Returns whether a node is a box of one array, or of what stands for one."""
    kind = type(node)
    is_linen, is_nnx = hasattr(kind, "replace_boxed"), hasattr(kind, "get_metadata")
    is_flax = hasattr(kind, "add_axis") and (is_linen or is_nnx)
    if not is_flax and not _has_named_axes(node):
        return False
    inside = _inside(node)
    is_container = isinstance(inside, (Mapping, list)) or type(inside) is tuple
    # Equinox has None in the place of a leaf that a filter leaves out.
    return inside is not None and not is_container


def _has_named_axes(node: Any) -> bool:
    """Returns whether a node is a NamedArray, each of whose axes has a name."""
    return hasattr(type(node), "resolve_axis") and hasattr(node, "axes")


def contents(node: Any) -> Any:
    """Returns what is in a box; what is none, as it is."""
    return _inside(node) if is_box(node) else node


def _inside(box: Any) -> Any:
    # Linen's own unbox adds a constraint.
    (inside,) = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return inside


def with_contents(node: Any, inside: Any) -> Any:
    """Returns a box like ``node`` with this in it; this alone, if that is no box."""
    if not is_box(node):
        return inside
    return jax.tree.structure(node, is_leaf=lambda x: x is not node).unflatten([inside])


def unboxed(tree: Any) -> Any:
    """Returns a tree with the contents of each box in its place."""
    return jax.tree.map(contents, tree, is_leaf=is_box)


def boxed_like(tree: Any, like: Any) -> Any:
    """Returns a tree with the boxes of one that it is equal to but for those."""
    return jax.tree.map(with_contents, like, tree, is_leaf=is_box)


def leaves_by_path(tree: Any) -> dict[tuple, Any]:
    """Returns each leaf by its key path, which boxes are no part of."""
    return dict(jax.tree.leaves_with_path(unboxed(tree)))


def names_by_path(tree: Any) -> dict[tuple, tuple]:
    """Returns the names of the axes of each leaf, of those that have some."""
    boxes = jax.tree.leaves_with_path(tree, is_leaf=is_box)
    return {path: tuple(names_of(box)) for path, box in boxes if names_of(box)}


def names_of(box: Any) -> Iterable[Any]:
    """Returns the names of the axes of a leaf, () if it is no box or has none."""
    if not is_box(box):
        return ()
    if _has_named_axes(box):
        return tuple(axis.name for axis in box.axes)
    if not hasattr(type(box), "get_metadata"):
        return getattr(box, "names", ())
    metadata = box.get_metadata()
    found = next((metadata[key] for key in _NAMES if metadata.get(key)), ())
    return found.spec if isinstance(found, NamedSharding) else found


def boxed_beside(box: Any, array: Any, axes: Axes) -> Any:
    """Returns an array in a box like that of a leaf, with the names of its own axes.

    An axis that is not as long as the leaf's, or a multiple of it, has no name: what
    the mesh divides is the leaf's. In a box where each must have one, it is called by
    its place: ``_1``.

    Args:
        box: Of the leaf.
        array: Made of some axes of the leaf.
        axes: For each of its axes, the leaf's merged in it; () for one without a name.
    """
    shape = contents(box).shape

    def kept(names: Iterable[Any]) -> list[Any]:
        parts = _padded(names, len(shape))
        named = [_outermost(parts, group) for group in axes]
        return [
            None if axis is None or length % shape[axis] else parts[axis]
            for length, axis in zip(array.shape, named, strict=True)
        ]

    def of_array(names: Any) -> Any:
        if isinstance(names, NamedSharding):
            return NamedSharding(names.mesh, of_array(names.spec))
        if isinstance(names, PartitionSpec):
            return PartitionSpec(*kept(names))
        return tuple(kept(names)) if isinstance(names, tuple) else None

    if _has_named_axes(box):
        found = enumerate(zip(kept(names_of(box)), array.shape, strict=True))
        sizes = {name or f"_{place}": length for place, (name, length) in found}
        return type(box)(array, sizes)
    new = with_contents(box, array)
    if hasattr(type(box), "get_metadata"):
        for key, names in box.get_metadata().items():
            if key in _NAMES:
                new.set_metadata(key, of_array(names))
        return new
    # Names are all that a box of an array of other axes can be given.
    has_names = hasattr(box, "names")
    return dataclasses.replace(new, names=of_array(box.names)) if has_names else array


def merged_spec(spec: Iterable[Any], ndim: int, axes: Axes) -> list[Any]:
    """Returns the partition of each axis of an array made of a leaf's axes.

    Merged axes are partitioned as the outermost that is: of logical names no one says
    which the mesh has, and nothing is replicated that belongs to a partitioned leaf.

    Args:
        spec: Of the leaf: names of its first axes, or None.
        ndim: Of the leaf.
        axes: For each axis of the array, the leaf's merged in it.
    """
    parts = _padded(spec, ndim)
    found = (_outermost(parts, group) for group in axes)
    return [None if axis is None else parts[axis] for axis in found]


def _padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    parts = tuple(spec)
    return parts + (None,) * (ndim - len(parts))


def _outermost(parts: Sequence[Any], group: Sequence[int]) -> int | None:
    """Returns the first of some axes that is partitioned, None if none is."""
    return next((axis for axis in group if parts[axis]), None)
