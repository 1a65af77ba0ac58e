"""Shardings of the state, from those of the parameters; explicit meshes made automatic.

Both of JAX's sharding modes reach the same code: under explicit axis types it runs in a
region whose axes are automatic, and comes out with the shardings that went in.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lowrank_optax.matrix.arrays import struct_of
from lowrank_optax.matrix.boxes import Axes, boxed_beside, contents, is_box, merged_spec
from lowrank_optax.matrix.view import MatrixView


def with_automatic_axes(function: Callable, out_like: Any, *args: Any) -> Any:
    """Returns function(*args), computed with the mesh's explicit axes automatic.

    svd, qr, cholesky and eigh refuse operands sharded explicitly over their matrix
    axes, and a product over a sharded axis must name its output's sharding; the
    compiler's partitioner needs neither.

    Args:
        function: Any function of arrays.
        out_like: Tree whose leaves have the shardings of the function's outputs.
        args: Its arguments, trees of arrays.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    out_sharding = jax.tree.map(lambda x: _explicit_sharding(x, mesh), out_like)
    automatic = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return automatic(*args)


def _explicit_mesh(tree: Any):
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in getattr(mesh, "axis_types", ()):
            # Outside of a trace the devices are known, and needed.
            sharding = None if isinstance(leaf, Tracer) else named_sharding(leaf)
            return mesh if sharding is None else sharding.mesh
    return None


def on_mesh_of(like: Any, tree: Any) -> Any:
    """Returns a tree with what lies on no mesh replicated over that of the leaves.

    Without ``jax.set_mesh`` a new scalar lies on none, and comes out of a region of
    automatic axes on the mesh: under explicit axes that is another type.

    Args:
        like: Tree of arrays; shapes in it lie on no mesh.
        tree: Tree of arrays.
    """
    mesh = _explicit_mesh(like)
    if mesh is None:
        return tree
    replicated = NamedSharding(mesh, PartitionSpec())

    def on_mesh(leaf: Any) -> Any:
        if not jax.typeof(leaf).sharding.mesh.empty:
            return leaf
        is_traced = isinstance(leaf, Tracer) or isinstance(mesh, AbstractMesh)
        put = jax.sharding.reshard if is_traced else jax.device_put
        return put(leaf, replicated)

    return jax.tree.map(on_mesh, tree)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and, if it is known, the sharding over a mesh of a leaf."""
    return struct_of(leaf, named_sharding(leaf))


def zeros_beside(leaf: Any, shape: tuple[int, ...], dtype: Any, axes: Axes) -> Any:
    """Returns zeros sharded as the given axes of ``leaf`` are; boxed, if it is.

    Args:
        leaf: Parameter: array, tracer, or ShapeDtypeStruct; in a box or not.
        shape: Shape of the result.
        dtype: Its dtype.
        axes: For each axis of the result, the axes of ``leaf`` merged in it; () for one
            that is never sharded, such as the rank. An axis that the mesh does not
            divide is not sharded either.
    """
    if is_box(leaf):
        zeros = zeros_beside(contents(leaf), shape, dtype, axes)
        return boxed_beside(leaf, zeros, axes)
    sharding = named_sharding(leaf)
    if sharding is None and isinstance(leaf, Tracer):
        # Inside shard_map they vary over the devices that the leaf does.
        return jax.lax.full_like(leaf, 0, dtype, shape)
    if sharding is None:
        return jnp.zeros(shape, dtype)
    parts = merged_spec(sharding.spec, leaf.ndim, axes)
    merged = PartitionSpec(
        *(
            part if length % _shards(sharding.mesh, part) == 0 else None
            for length, part in zip(shape, parts, strict=True)
        )
    )
    sharding = NamedSharding(sharding.mesh, merged)
    if isinstance(leaf, Tracer):
        return jax.lax.full_like(leaf, 0, dtype, shape, sharding)
    return jnp.zeros(shape, dtype, device=sharding)


def zeros_like_update(leaf: Any, update: Any) -> Any:
    """Returns zeros of the dtype of an update; shaped, sharded, boxed as its leaf."""
    shape = contents(leaf).shape
    axes = tuple((axis,) for axis in range(len(shape)))
    return zeros_beside(leaf, shape, update.dtype, axes)


def _explicit_sharding(leaf: Any, mesh: Any) -> NamedSharding:
    """Returns the sharding of a leaf; over the whole mesh, if it is not on it."""
    is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    sharding = leaf.sharding if is_abstract else jax.typeof(leaf).sharding
    if sharding is None or sharding.mesh.empty:
        return NamedSharding(mesh, PartitionSpec())
    return sharding


def named_sharding(leaf: Any) -> NamedSharding | None:
    """Returns the sharding over a mesh of a leaf, boxed or not; None: not known."""
    leaf = contents(leaf)
    if isinstance(leaf, Tracer):
        # A tracer knows its sharding under explicit axis types only.
        sharding = jax.typeof(leaf).sharding
        explicit = AxisType.Explicit in getattr(sharding.mesh, "axis_types", ())
        return sharding if explicit else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _shards(mesh: Any, part: Any) -> int:
    names = part if isinstance(part, tuple) else (part,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def basis_axes(view: MatrixView) -> tuple[tuple[int, ...], ...]:
    """Returns the leaf's axes behind each axis of a basis (*stack, b/c, r).

    Blocks of a sharded side lie on one device each: their length b/c is whole.
    """
    projected = view.projected_axes if view.granularity == 1 else ()
    return (*stack_axes(view), projected, ())


def coordinate_axes(view: MatrixView) -> tuple[tuple[int, ...], ...]:
    """Returns the leaf's axes behind each axis of coordinates (*stack, a*c, r)."""
    return (*stack_axes(view), view.kept_axes, ())


def stack_axes(view: MatrixView) -> tuple[tuple[int, ...], ...]:
    """Returns the leaf's axes behind each axis of a number per matrix (*stack,)."""
    return tuple((axis,) for axis in view.stack_axes)
