"""Shardings of the state, from those of the parameters; explicit meshes made automatic.

Both of JAX's sharding modes run the same code. Under explicit axis types the code runs
in a region of automatic axes, and its results have the shardings of its inputs.
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

    Under explicit axes, svd, qr, cholesky and eigh refuse operands with sharded matrix
    axes, and a product over a sharded axis must name the sharding of its output. The
    compiler's partitioner has neither restriction.

    Args:
        function: Any function of arrays.
        out_like: Tree of leaves with the shardings of the function's outputs.
        args: Arguments of the function, trees of arrays.
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
            # Outside a trace the mesh must be concrete, with its devices.
            sharding = None if isinstance(leaf, Tracer) else named_sharding(leaf)
            return mesh if sharding is None else sharding.mesh
    return None


def on_mesh_of(like: Any, tree: Any) -> Any:
    """Returns a tree whose arrays all lie on the mesh of ``like``.

    Arrays on no mesh are replicated over the mesh. Without ``jax.set_mesh`` a new
    scalar lies on no mesh, and after a region of automatic axes it lies on the mesh.
    Under explicit axes these are two types.

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
    """Returns shape and dtype of a leaf, and its sharding over a mesh, if known."""
    return struct_of(leaf, named_sharding(leaf))


def zeros_beside(leaf: Any, shape: tuple[int, ...], dtype: Any, axes: Axes) -> Any:
    """Returns zeros with the sharding of the given axes of ``leaf``, boxed alike.

    Args:
        leaf: Parameter: array, tracer, or ShapeDtypeStruct; in a box or not.
        shape: Shape of the result.
        dtype: Dtype of the result.
        axes: For each axis of the result, the axes of ``leaf`` merged into it; () for
            an axis that is never sharded, such as the rank. An axis whose length the
            mesh does not divide is not sharded either.
    """
    if is_box(leaf):
        zeros = zeros_beside(contents(leaf), shape, dtype, axes)
        return boxed_beside(leaf, zeros, axes)
    sharding = named_sharding(leaf)
    if sharding is None and isinstance(leaf, Tracer):
        # Inside shard_map the zeros vary over the same devices as the leaf.
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
    """Returns zeros of an update's dtype, with its leaf's shape, sharding and box."""
    shape = contents(leaf).shape
    axes = tuple((axis,) for axis in range(len(shape)))
    return zeros_beside(leaf, shape, update.dtype, axes)


def _explicit_sharding(leaf: Any, mesh: Any) -> NamedSharding:
    """Returns the sharding of a leaf; replicated, if the leaf lies on no mesh."""
    is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    sharding = leaf.sharding if is_abstract else jax.typeof(leaf).sharding
    if sharding is None or sharding.mesh.empty:
        return NamedSharding(mesh, PartitionSpec())
    return sharding


def named_sharding(leaf: Any) -> NamedSharding | None:
    """Returns a leaf's sharding over a mesh, None if unknown; the leaf may be boxed."""
    leaf = contents(leaf)
    if isinstance(leaf, Tracer):
        # A tracer has its sharding under explicit axis types only.
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

    At a granularity above 1 the axis b/c is not sharded: each device has whole blocks.
    """
    projected = view.projected_axes if view.granularity == 1 else ()
    return (*stack_axes(view), projected, ())


def coordinate_axes(view: MatrixView) -> tuple[tuple[int, ...], ...]:
    """Returns the leaf's axes behind each axis of coordinates (*stack, a*c, r)."""
    return (*stack_axes(view), view.kept_axes, ())


def stack_axes(view: MatrixView) -> tuple[tuple[int, ...], ...]:
    """Returns the leaf's axes behind each axis of a number per matrix (*stack,)."""
    return tuple((axis,) for axis in view.stack_axes)
