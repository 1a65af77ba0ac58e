"""``memory_plan``: the memory of a future run, from shapes alone."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lowrank_optax.binding.moments import owner_and_field
from lowrank_optax.binding.optimizer import bind
from lowrank_optax.codes import bytes_of, is_coded, shape_of
from lowrank_optax.kinds import Kind, kinds_of
from lowrank_optax.matrix.arrays import as_arrays, leaf_name, struct_of
from lowrank_optax.matrix.boxes import leaves_by_path, unboxed
from lowrank_optax.matrix.plan import LeafPlan
from lowrank_optax.matrix.sharding import abstract, named_sharding
from lowrank_optax.projected import ProjectedSum
from lowrank_optax.report.memory import Bytes, LeafMemory, MemoryPlan
from lowrank_optax.report.projections import projections
from lowrank_optax.report.state_shardings import sharded_state
from lowrank_optax.subspace import Subspace

_OF_SUBSPACE = set(Subspace._fields) - {"basis"}
_SUMS = {"sums", "acc_grads"}


def memory_plan(
    optimizer: optax.GradientTransformation,
    params: Any,
    compiled: Any = None,
    state_shardings: Any = None,
) -> MemoryPlan:
    """Returns the bytes of training with an optimizer, leaf by leaf.

    The plan comes from the optimizer's own ``init`` on shapes: nothing is allocated,
    and chains, masks and partitions are followed at any depth. Activations are left
    out; a compiled step adds their bytes.

    Args:
        optimizer: Any Optax transformation.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``. If each has a
            ``NamedSharding``, the plan has the bytes on one device too.
        compiled: Compiled training step, ``jax.jit(step, donate_argnums=...)
            .lower(...).compile()``. The plan then has XLA's own numbers, of one device.
        state_shardings: A tree like the state, with a ``NamedSharding`` for each array;
            each parameter then needs one too. An array whose sharding has the memory
            kind ``"pinned_host"`` has no bytes on the device. None: what
            :func:`lowrank_optax.state_shardings` returns.

    Raises:
        TypeError: If a leaf is neither an array nor a number, or one of
            ``state_shardings`` is no ``NamedSharding``.
        ValueError: If the compiled step has no memory analysis on its backend, or if
            ``state_shardings`` do not fit the state.

    Example:
        >>> import jax.numpy as jnp, lowrank_optax
        >>> params = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)}
        >>> plan = memory_plan(lowrank_optax.galore(1e-2, rank=128), params)
        >>> plan.parameter_bytes, plan.optimizer_bytes, plan.full_rank_bytes
        (8388608, 4718620, 33554440)
    """
    params = jax.tree.map(abstract, as_arrays(params))
    shapes = jax.tree.map(struct_of, params)
    # A new function each time: eval_shape caches init, and would not call it again.
    state = jax.eval_shape(lambda p: optimizer.init(p), shapes)
    plans = projections(optimizer, shapes)
    kinds, binding = kinds_of(None), bind(optimizer, shapes)
    inside = binding.projected.keys() - binding.at_full_size
    for who in binding.transformations:
        kinds.update(who.parts.moments)
    sharded = _sharded_state(optimizer, params, state, state_shardings)
    leaves = leaves_by_path(params)
    fields: dict[tuple, dict[str, int]] = {path: {} for path in leaves}
    on_device: dict[tuple, dict[str, int]] = {path: {} for path in leaves}
    full_rank = dict.fromkeys(leaves, 0)
    other = 0
    device_nodes = [None] * len(_nodes(state)) if sharded is None else _nodes(sharded)
    for (path, node), of_device in zip(_nodes(state), device_nodes, strict=True):
        owner, field = _owner_and_field(path, leaves.keys())
        if owner is None:
            other += bytes_of(node)
            continue
        mine = fields[owner]
        mine[field] = mine.get(field, 0) + bytes_of(node)
        full_rank[owner] += _at_full_rank(leaves[owner], field, node, kinds)
        if of_device is not None:
            size = sum(_shard_bytes(x) for x in jax.tree.leaves(of_device[1]))
            on_device[owner][field] = on_device[owner].get(field, 0) + size

    def of_leaf(path, leaf) -> LeafMemory:
        name = leaf_name(path)
        plan, per_device = plans[name], None
        in_subspace = plan if path in inside else None
        if sharded is not None:
            shard = _shard_shape(leaf)
            per_device = _bytes(shard, leaf.dtype, in_subspace, on_device[path])
        return LeafMemory(
            path=name,
            shape=tuple(leaf.shape),
            dtype=str(leaf.dtype),
            projection=str(plan),
            is_projected=plan.is_projected,
            bytes=_bytes(leaf.shape, leaf.dtype, in_subspace, fields[path]),
            full_rank_bytes=full_rank[path],
            per_device=per_device,
        )

    return MemoryPlan(
        leaves=tuple(of_leaf(path, leaf) for path, leaf in leaves.items()),
        other_bytes=other,
        compiled=None if compiled is None else _analysis(compiled),
    )


def _nodes(state: Any) -> list[tuple[tuple, Any]]:
    def is_array(node):
        return is_coded(node) or isinstance(node, ProjectedSum)

    return jax.tree.leaves_with_path(unboxed(state), is_leaf=is_array)


def _owner_and_field(path: tuple, owners) -> tuple[tuple | None, str]:
    """Returns the parameter of a state's array, and the array's field."""
    owner, field = owner_and_field(path, owners)
    if owner is not None:
        return owner, "scalars" if field in _OF_SUBSPACE else field
    # Fields of a subspace, or slices of a leaf, stand behind the parameter's path.
    for end in (len(path) - 1, len(path) - 2):
        owner, field = owner_and_field(path[: max(end, 0)], owners)
        if owner is None:
            continue
        name = getattr(path[end], "name", getattr(path[end], "key", field))
        return owner, "scalars" if name in _OF_SUBSPACE else str(name)
    return None, ""


def _at_full_rank(leaf: Any, field: str, node: Any, kinds: Mapping[str, Kind]) -> int:
    """Returns the bytes of a field, if the leaf were not projected."""
    is_moment = kinds.get(field) in ("first", "second") or field in _SUMS
    if not is_moment:
        return 0 if field in ("basis", "projector", "scalars") else bytes_of(node)
    if not isinstance(node, ProjectedSum) and not shape_of(node):
        return bytes_of(node)
    return math.prod(leaf.shape) * max(4, leaf.dtype.itemsize)


def _sharded_state(optimizer, params: Any, state: Any, given: Any) -> Any:
    """Returns the state's shapes with shardings; None, if shardings are not known."""
    shardings = [named_sharding(leaf) for leaf in jax.tree.leaves(params)]
    meshes = [sharding.mesh for sharding in shardings if sharding is not None]
    is_known = bool(meshes) and len(meshes) == len(shardings)
    if given is None:
        return sharded_state(optimizer, params, meshes[0]) if is_known else None
    if not is_known:
        raise ValueError("state_shardings need parameters with a NamedSharding each.")
    if jax.tree.structure(given) != jax.tree.structure(state):
        raise ValueError(
            "state_shardings are not a tree like the state; start from "
            "lowrank_optax.state_shardings(optimizer, params)."
        )

    def with_sharding(path, leaf, sharding):
        where = f"state_shardings{jax.tree_util.keystr(path)}"
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"{where} is {sharding!r}, and no NamedSharding.")
        try:
            # The first counts the axes, the second divides them.
            sharding.check_compatible_aval(leaf.shape)
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            told = f"{where} is {sharding}, which does not fit {leaf.shape}."
            raise ValueError(told) from error
        return struct_of(leaf, sharding)

    return jax.tree_util.tree_map_with_path(with_sharding, state, given)


def _shard_bytes(leaf: Any) -> int:
    return math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of an array's part in the memory of a device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and sharding.memory_kind == "pinned_host":
        return (0,) * max(1, len(leaf.shape))
    return tuple(leaf.shape) if sharding is None else sharding.shard_shape(leaf.shape)


def _bytes(
    shape: tuple[int, ...], dtype: Any, plan: LeafPlan | None, state: dict[str, int]
) -> Bytes:
    """Returns the bytes of a leaf, or of its part with this shape on a device.

    Args:
        shape: Of the leaf, or of the part.
        dtype: Of the leaf.
        plan: Of a leaf whose gradient may be inside the subspace; None: it may not.
        state: Bytes of the optimizer's state by kind.
    """
    size = inside = math.prod(shape) * dtype.itemsize
    if plan is not None and plan.view is not None:
        view = plan.view
        kept = math.prod(shape[x] for x in (*view.stack_axes, *view.kept_axes))
        numbers = kept * view.granularity * plan.capacity
        inside = numbers * jnp.promote_types(dtype, jnp.float32).itemsize
    return Bytes(size, size, inside, state)


def _analysis(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend has no memory analysis of a compiled step.")
    arguments, outputs = (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
    )
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": temporaries,
        "peak": arguments + outputs - aliased + temporaries,
    }
