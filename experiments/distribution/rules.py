"""How parameters and optimizer state lie on the mesh: one table of rules."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import lowrank_optax
from experiments.distribution.mesh import whole
from experiments.errors import UserError
from experiments.model.logical_axes import logical_axes

# Name of a parameter's axis -> axis of the mesh.
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
# Axes that stay whole where the mesh does not divide them: users do not choose them.
_MAY_STAY_WHOLE = frozenset({"vocab"})


def parameter_shardings(
    shapes: Any,
    mesh: Mesh | AbstractMesh,
    report: Callable[[str], None] | None = None,
) -> Any:
    """Returns a tree like ``shapes`` of each parameter's sharding.

    Args:
        shapes: Parameters or their shapes.
        mesh: With the axes :data:`experiments.distribution.mesh.AXES`.
        report: Called with a line for each leaf that stays whole along an axis.

    Raises:
        UserError: If an axis of a leaf is not a multiple of the mesh's. It names the
            leaf.
    """

    def of_leaf(path, leaf, names):
        axes = []
        for length, name in zip(leaf.shape, names, strict=True):
            axis = RULES.get(name)
            parts = 1 if axis is None else mesh.shape[axis]
            if parts > 1 and length % parts:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                told = f"{name}, {length:,} of {where} {leaf.shape}"
                if name not in _MAY_STAY_WHOLE:
                    raise UserError(
                        f"--mesh {axis}={parts} does not divide {told}; choose a "
                        f"divisor of {length:,}"
                    )
                if report:
                    report(f"--mesh {axis}={parts}: {told}, is not cut, but whole")
                parts = 1
            axes.append(axis if parts > 1 else None)
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of_leaf, shapes, logical_axes(shapes))


def on_mesh(shapes: Any, shardings: Any) -> Any:
    """Returns the shapes with their shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def placed_shapes(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """Returns the shapes of parameters and of the optimizer's state, with shardings.

    Args:
        tx: The optimizer.
        params: Shapes of the parameters, with shardings on one mesh.
    """
    shapes = jax.eval_shape(tx.init, params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    cut = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    if cut:
        shardings = lowrank_optax.state_shardings(tx, params)
    else:
        shardings = jax.tree.map(lambda _: whole(mesh), shapes)
    return params, on_mesh(shapes, shardings)


def bytes_per_device(shapes: Any) -> int:
    """Returns the bytes that one device has of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
