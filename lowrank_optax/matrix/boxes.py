"""Boxes: pytree nodes of one array, on which frameworks write the names of its axes.

Boxes are ``flax.nnx.Variable``, Linen's ``Partitioned`` and ``LogicallyPartitioned``,
and Haliax's ``NamedArray``. The library recognises boxes by their methods and imports
no framework. Computations see the arrays inside the boxes. A state array of a boxed
leaf gets a box too, with the leaf's names for the axes that the array has.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# For each axis of an array, the axes of the leaf that are merged into this axis.
Axes = Sequence[Sequence[int]]

# NNX's metadata keys for the names of axes, or for the sharding with these names.
_NAMES = ("optimizer_sharding", "out_sharding", "sharding", "sharding_names")


def is_box(node: Any) -> bool:
    """Returns whether a node is a box of one array, or of an array's stand-in."""
    kind = type(node)
    is_linen, is_nnx = hasattr(kind, "replace_boxed"), hasattr(kind, "get_metadata")
    is_flax = hasattr(kind, "add_axis") and (is_linen or is_nnx)
    if not is_flax and not _has_named_axes(node):
        return False
    inside = _inside(node)
    is_container = isinstance(inside, (Mapping, list)) or type(inside) is tuple
    # Equinox puts None in the place of a leaf that a filter removes.
    return inside is not None and not is_container


def _has_named_axes(node: Any) -> bool:
    """Returns whether a node is a NamedArray, where each axis has a name."""
    return hasattr(type(node), "resolve_axis") and hasattr(node, "axes")


def contents(node: Any) -> Any:
    """Returns the array in a box; a node that is no box, as it is."""
    return _inside(node) if is_box(node) else node


def _inside(box: Any) -> Any:
    # Linen's own unbox adds a constraint.
    (inside,) = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return inside


def with_contents(node: Any, inside: Any) -> Any:
    """Returns a box like ``node`` around ``inside``; ``inside``, if no box is given."""
    if not is_box(node):
        return inside
    return jax.tree.structure(node, is_leaf=lambda x: x is not node).unflatten([inside])


def unboxed(tree: Any) -> Any:
    """Returns a tree with the contents of each box in its place."""
    return jax.tree.map(contents, tree, is_leaf=is_box)


def boxed_like(tree: Any, like: Any) -> Any:
    """Returns a tree with the boxes of ``like``, a tree that differs in boxes alone."""
    return jax.tree.map(with_contents, like, tree, is_leaf=is_box)


def leaves_by_path(tree: Any) -> dict[tuple, Any]:
    """Returns each leaf by its key path. Boxes add no key to the path."""
    return dict(jax.tree.leaves_with_path(unboxed(tree)))


def names_by_path(tree: Any) -> dict[tuple, tuple]:
    """Returns the names of the axes of each leaf with named axes, by key path."""
    boxes = jax.tree.leaves_with_path(tree, is_leaf=is_box)
    return {path: tuple(names_of(box)) for path, box in boxes if names_of(box)}


def names_of(box: Any) -> Iterable[Any]:
    """Returns the names of a leaf's axes; (), if it is no box or has no names."""
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

    An axis keeps a name only if its length is a multiple of the leaf's axis, because
    the mesh divides the leaf's axis. Where a box needs a name for every axis, an axis
    without a name is called by its position: ``_1``.

    Args:
        box: Box of the leaf.
        array: Array made of some axes of the leaf.
        axes: For each axis of the array, the leaf's axes merged into it; () for an
            axis without a name.
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
    # A box of an array with other axes can be given names, and nothing else.
    has_names = hasattr(box, "names")
    return dataclasses.replace(new, names=of_array(box.names)) if has_names else array


def merged_spec(spec: Iterable[Any], ndim: int, axes: Axes) -> list[Any]:
    """Returns the partition of each axis of an array made of a leaf's axes.

    Merged axes are partitioned as the outermost partitioned axis among them. The mesh
    may lack a logical name, so the names alone cannot choose. An array beside a
    partitioned leaf is never replicated as a whole.

    Args:
        spec: Partition of the leaf: names of its first axes, or None.
        ndim: Number of axes of the leaf.
        axes: For each axis of the array, the leaf's axes merged into it.
    """
    parts = _padded(spec, ndim)
    found = (_outermost(parts, group) for group in axes)
    return [None if axis is None else parts[axis] for axis in found]


def _padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    parts = tuple(spec)
    return parts + (None,) * (ndim - len(parts))


def _outermost(parts: Sequence[Any], group: Sequence[int]) -> int | None:
    """Returns the first partitioned axis of a group, None if no axis is."""
    return next((axis for axis in group if parts[axis]), None)
