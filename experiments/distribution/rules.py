"""How parameters and optimizer state lie on the mesh: one table of rules."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import lowrank_optax
from experiments.distribution.host_memory import DEVICE, PINNED, in_host_memory
from experiments.distribution.mesh import whole
from experiments.errors import UserError
from experiments.model.groups import parameter_groups
from experiments.model.logical_axes import logical_axes

# Axis of the mesh -> names of the axes of parameters that it may cut. tensor cuts each
# of them. fsdp cuts one: a low-rank method keeps the longer side of a matrix, and its
# moments are cut along this side alone.
RULES = {"tensor": ("heads", "mlp", "vocab"), "fsdp": ("embed", "heads", "mlp")}
# Axes that stay whole where the mesh does not divide them: users do not choose them.
_MAY_STAY_WHOLE = frozenset({"vocab"})
# Smaller arrays of the state save little, and each costs a message to gather.
LEAST_BYTES = 16 * 1024
# The axes of the mesh that each axis of an array is cut over.
_Parts = list[tuple[str, ...]]


def parameter_shardings(
    shapes: Any,
    mesh: Mesh | AbstractMesh,
    report: Callable[[str], None] | None = None,
) -> Any:
    """Returns a tree like ``shapes`` of each parameter's sharding.

    tensor cuts each axis that has one of its names. fsdp cuts the longest axis that has
    one of its names and that it divides, the first among equals. fsdp may cut an axis
    that tensor cuts too: it then divides the pieces. A leaf whose axes have no names is
    whole.

    Args:
        shapes: Parameters or their shapes.
        mesh: With the axes :data:`experiments.distribution.mesh.AXES`.
        report: Called with a line for each leaf that stays whole along an axis.

    Raises:
        UserError: If tensor does not divide an axis of a leaf, or fsdp none of them. It
            names the leaf.
    """

    def of_leaf(path, leaf, names):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        parts: _Parts = [()] * leaf.ndim
        tensor, fsdp = (mesh.shape[axis] for axis in ("tensor", "fsdp"))
        for axis in _named(names, "tensor") if tensor > 1 else ():
            name, length = names[axis], leaf.shape[axis]
            if length % tensor == 0:
                parts[axis] = ("tensor",)
                continue
            told = f"{name}, {length:,} of {where} {leaf.shape}"
            if name not in _MAY_STAY_WHOLE:
                raise UserError(
                    f"--mesh tensor={tensor} does not divide {told}; choose a divisor "
                    f"of {length:,}"
                )
            if report:
                report(f"--mesh tensor={tensor}: {told}, is not cut, but whole")
        axes = _named(names, "fsdp") if fsdp > 1 else []
        if axes and not _cut_over_fsdp(parts, leaf.shape, axes, mesh):
            told = " or ".join(f"{names[x]}, {leaf.shape[x]:,}" for x in axes)
            pieces = [leaf.shape[x] // _shards(parts[x], mesh) for x in axes]
            some = " or ".join(f"{x:,}" for x in dict.fromkeys(pieces))
            raise UserError(
                f"--mesh fsdp={fsdp} does not divide {told} of {where} {leaf.shape}; "
                f"choose a divisor of {some}"
            )
        return _sharding(parts, mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, shapes, logical_axes(shapes))


def _named(names: Sequence[str | None], axis: str) -> list[int]:
    return [i for i, name in enumerate(names) if name in RULES[axis]]


def _cut_over_fsdp(
    parts: _Parts, shape: Sequence[int], axes: Iterable[int], mesh: Any
) -> bool:
    """Cuts the longest of the axes that fsdp divides; returns whether there is one."""
    fsdp = mesh.shape["fsdp"]
    divided = (x for x in axes if shape[x] % (_shards(parts[x], mesh) * fsdp) == 0)
    longest = max(divided, key=lambda x: shape[x], default=None)
    if longest is None:
        return False
    # tensor's pieces stay whole where the shares of fsdp are gathered.
    parts[longest] = (*parts[longest], "fsdp")
    return True


def _shards(names: Iterable[str], mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _sharding(
    parts: _Parts, mesh: Any, memory_kind: str | None = None
) -> NamedSharding:
    cut = [x[0] if len(x) == 1 else x or None for x in parts]
    while cut and cut[-1] is None:
        cut.pop()
    return NamedSharding(mesh, PartitionSpec(*cut), memory_kind=memory_kind)


def on_mesh(shapes: Any, shardings: Any) -> Any:
    """Returns the shapes with their shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def placed_shapes(
    tx: optax.GradientTransformation, params: Any, memory: str = DEVICE
) -> tuple[Any, Any]:
    """Returns the shapes of parameters and of the optimizer's state, with shardings.

    An array of the state follows its parameter, by
    :func:`lowrank_optax.state_shardings`. Bases are whole then where fsdp cuts the kept
    side of their matrix. An array of at least :data:`LEAST_BYTES` that fsdp does not
    cut is cut along its longest axis that fsdp divides. Such a basis is gathered for
    its use. An array with the shape of a whole parameter, such as a norm, stays whole.

    Args:
        tx: The optimizer.
        params: Shapes of the parameters, with shardings on one mesh.
        memory: That the state is in, a name of
            :mod:`experiments.distribution.host_memory`.
    """
    shapes = jax.eval_shape(tx.init, params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    cut = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    if cut:
        shardings = lowrank_optax.state_shardings(tx, params)
        kept = {x.shape for x in jax.tree.leaves(params) if not _is_cut(x.sharding)}
        shardings = jax.tree.map(
            lambda x, y: y if x.shape in kept else _cut_further(x, y), shapes, shardings
        )
    else:
        shardings = jax.tree.map(lambda _: whole(mesh), shapes)
    state = on_mesh(shapes, shardings)
    return params, in_host_memory(state) if memory == PINNED else state


def _cut_further(leaf: Any, sharding: NamedSharding) -> NamedSharding:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if _is_cut(sharding) or size < LEAST_BYTES or sharding.mesh.shape["fsdp"] == 1:
        return sharding
    parts = _parts(sharding, leaf.ndim)
    _cut_over_fsdp(parts, leaf.shape, range(leaf.ndim), sharding.mesh)
    return _sharding(parts, sharding.mesh)


def _is_cut(sharding: NamedSharding) -> bool:
    return any("fsdp" in names for names in _parts(sharding, len(sharding.spec)))


def _parts(sharding: NamedSharding, ndim: int) -> _Parts:
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return [x if isinstance(x, tuple) else () if x is None else (x,) for x in spec]


def dividing(leaf: Any, sharding: Any) -> Any:
    """Returns a sharding without the cuts that do not divide an array's shape.

    Args:
        leaf: Array, or its shape.
        sharding: Of an array with as many axes; on no mesh it is returned as it is.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh, parts = sharding.mesh, _parts(sharding, leaf.ndim)
    pairs = zip(leaf.shape, parts, strict=True)
    kept = [x if n % _shards(x, mesh) == 0 else () for n, x in pairs]
    return _sharding(kept, mesh, sharding.memory_kind)


def memory_plan(
    tx: optax.GradientTransformation, params: Any, memory: str = DEVICE
) -> Any:
    """Returns the plan of :func:`lowrank_optax.memory_plan`, the state placed as here.

    Matrices that adapters leave as they are have no gradients.

    Args:
        tx: The optimizer.
        params: Shapes of the parameters. With shardings on one mesh the plan has the
            bytes of one device too.
        memory: See :func:`placed_shapes`. What is not in the device's is none of its
            bytes.
    """
    shardings = None
    if all(x.sharding is not None for x in jax.tree.leaves(params)):
        _, state = placed_shapes(tx, params, memory)
        shardings = jax.tree.map(lambda x: x.sharding, state)
    plan = lowrank_optax.memory_plan(tx, params, state_shardings=shardings)
    groups = jax.tree.leaves(parameter_groups(params))
    leaves = map(_without_gradient_if_frozen, plan.leaves, groups)
    return dataclasses.replace(plan, leaves=tuple(leaves))


def _without_gradient_if_frozen(leaf: Any, group: str) -> Any:
    if group != "frozen":
        return leaf
    none = {"gradients": 0, "subspace_gradients": 0}
    of_device = leaf.per_device and dataclasses.replace(leaf.per_device, **none)
    of_all = dataclasses.replace(leaf.bytes, **none)
    return dataclasses.replace(leaf, bytes=of_all, per_device=of_device)


def bytes_per_device(shapes: Any) -> int:
    """Returns the bytes that one device has of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
