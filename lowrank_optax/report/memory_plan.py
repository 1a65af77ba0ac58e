"""``memory_plan``: what a run is going to take, from shapes alone."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from lowrank_optax.binding.moments import KNOWN_FIELDS, owner_and_field
from lowrank_optax.projected import is_projected
from lowrank_optax.report.projections import projections
from lowrank_optax.storage.codes import bytes_of, is_coded, shape_of

_OF_SUBSPACE = {"rank", "demand", "age", "refreshes", "failures", "trend", "residual"}
_SUMS = {"sums", "acc_grads"}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of one parameter, or of all.

    Attributes:
        parameters: Of the parameters.
        gradients: Of their gradients, in the same dtype.
        state: Of the optimizer's state by what it is: "basis", the fields of inner
            transformations ("mu", "nu", ...), "sums" of micro-batches, "scalars".
    """

    parameters: int
    gradients: int
    state: Mapping[str, int]

    @property
    def optimizer(self) -> int:
        """Of the optimizer's state in all."""
        return sum(self.state.values())

    @property
    def total(self) -> int:
        """Of all three."""
        return self.parameters + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class LeafMemory:
    """One parameter.

    Attributes:
        path: As ``jax.tree_util.keystr`` writes it.
        shape: Of the parameter.
        dtype: Of the parameter.
        projection: How it is projected, or why it is not, in words.
        is_projected: Whether it is.
        bytes: On all devices together, each array counted once.
        full_rank_bytes: Of the state, if this leaf was not projected: each moment as
            large as the parameter, in float32, no basis.
        per_device: Of one device; None where shardings are not known.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    projection: str
    is_projected: bool
    bytes: Bytes
    full_rank_bytes: int
    per_device: Bytes | None


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a run takes; see :func:`memory_plan`. ``str`` gives a table.

    Attributes:
        leaves: One entry per parameter.
        other_bytes: Of the part of the state that belongs to no parameter: counters.
        compiled: Of a compiled step, by XLA: "arguments", "outputs", "aliased"
            (arguments whose memory outputs take over), "temporaries", and "peak", which
            is what has to be there at once. None, if none was given.
    """

    leaves: tuple[LeafMemory, ...]
    other_bytes: int
    compiled: Mapping[str, int] | None

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters."""
        return sum(leaf.bytes.parameters for leaf in self.leaves)

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients."""
        return sum(leaf.bytes.gradients for leaf in self.leaves)

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's whole state: what its arrays take, to the byte."""
        return sum(leaf.bytes.optimizer for leaf in self.leaves) + self.other_bytes

    @property
    def full_rank_bytes(self) -> int:
        """Of the state, if nothing was projected and nothing in few bits."""
        return sum(leaf.full_rank_bytes for leaf in self.leaves) + self.other_bytes

    @property
    def state_bytes(self) -> dict[str, int]:
        """Of the optimizer's state by what it is."""
        total: dict[str, int] = {}
        for leaf in self.leaves:
            for field, size in leaf.bytes.state.items():
                total[field] = total.get(field, 0) + size
        total["scalars"] = total.get("scalars", 0) + self.other_bytes
        return total

    @property
    def per_device(self) -> Bytes | None:
        """Of one device in all; None where shardings are not known."""
        parts = [leaf.per_device for leaf in self.leaves]
        if not all(parts):
            return None
        known = [part for part in parts if part is not None]
        state = {"scalars": self.other_bytes}
        for part in known:
            for field, size in part.state.items():
                state[field] = state.get(field, 0) + size
        parameters = sum(part.parameters for part in known)
        return Bytes(parameters, sum(part.gradients for part in known), state)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dicts, lists, strings and ints, for JSON."""
        totals = {
            "parameter_bytes": self.parameter_bytes,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "full_rank_bytes": self.full_rank_bytes,
            "state_bytes": self.state_bytes,
        }
        per_device = self.per_device
        if per_device is not None:
            totals["per_device"] = dataclasses.asdict(per_device)
        return {**totals, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("leaf", "parameters", "gradients", "state", "full rank", "of it")
        ]
        for leaf in self.leaves:
            of_it = ", ".join(f"{k} {_text(v)}" for k, v in leaf.bytes.state.items())
            rows.append(
                (
                    leaf.projection,
                    _text(leaf.bytes.parameters),
                    _text(leaf.bytes.gradients),
                    _text(leaf.bytes.optimizer),
                    _text(leaf.full_rank_bytes),
                    of_it,
                )
            )
        of_it = ", ".join(f"{k} {_text(v)}" for k, v in self.state_bytes.items())
        sums = (self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes)
        rows.append(("in all", *map(_text, (*sums, self.full_rank_bytes)), of_it))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(x.rjust(w) for x, w in zip(row[1:5], widths[1:], strict=True)),
                    row[5],
                ]
            ).rstrip()
            for row in rows
        ]
        if self.per_device is not None:
            device = self.per_device
            lines.append(
                f"on each device: parameters {_text(device.parameters)}, gradients "
                f"{_text(device.gradients)}, state {_text(device.optimizer)}"
            )
        if self.compiled is not None:
            parts = (f"{name} {_text(size)}" for name, size in self.compiled.items())
            lines.append("compiled step: " + ", ".join(parts))
        return "\n".join(lines)


def memory_plan(
    optimizer: optax.GradientTransformation, params: Any, compiled: Any = None
) -> MemoryPlan:
    """Returns the bytes that training with an optimizer takes, leaf by leaf.

    The optimizer's own ``init`` is asked, on shapes only: nothing is allocated, and the
    answer is what it will do, however deeply chained, masked or partitioned it is.
    Activations are not in it: give the compiled step for those.

    Args:
        optimizer: Any Optax transformation.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``. Where they have a
            ``NamedSharding``, the plan has the bytes of one device too.
        compiled: Compiled training step, ``jax.jit(step, donate_argnums=...)
            .lower(...).compile()``: XLA's own numbers come with it, of one device.

    Raises:
        ValueError: If the compiled step has no memory analysis on its backend.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)}
        >>> plan = memory_plan(lowrank_optax.galore(1e-2, rank=128), params)
        >>> plan.parameter_bytes, plan.optimizer_bytes, plan.full_rank_bytes
        (8388608, 4718616, 33554440)
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    # A function of its own each time: eval_shape would remember init, and not call.
    state = jax.eval_shape(lambda p: optimizer.init(p), shapes)
    plans = projections(optimizer, shapes)
    sharded = _sharded_state(optimizer, params)
    leaves = dict(jax.tree.leaves_with_path(params))
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
        full_rank[owner] += _at_full_rank(leaves[owner], field, node)
        if of_device is not None:
            size = sum(_shard_bytes(x) for x in jax.tree.leaves(of_device[1]))
            on_device[owner][field] = on_device[owner].get(field, 0) + size

    def of_leaf(path, leaf) -> LeafMemory:
        name = jax.tree_util.keystr(path) or "(the whole tree)"
        plan, size = plans[name], bytes_of(leaf)
        per_device = None
        if sharded is not None:
            shard = _shard_bytes(leaf)
            per_device = Bytes(shard, shard, on_device[path])
        return LeafMemory(
            path=name,
            shape=tuple(leaf.shape),
            dtype=str(jnp.dtype(leaf.dtype)),
            projection=str(plan),
            is_projected=plan.is_projected,
            bytes=Bytes(size, size, fields[path]),
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
        return is_coded(node) or is_projected(node)

    return jax.tree.leaves_with_path(state, is_leaf=is_array)


def _owner_and_field(path: tuple, owners) -> tuple[tuple | None, str]:
    """Returns the parameter that an array belongs to, and what it is for it."""
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


def _at_full_rank(leaf: Any, field: str, node: Any) -> int:
    """Returns the bytes that a field would take, were the leaf not projected."""
    is_moment = KNOWN_FIELDS.get(field) in ("first", "second") or field in _SUMS
    if not is_moment:
        return 0 if field in ("basis", "projector", "scalars") else bytes_of(node)
    if not is_projected(node) and not shape_of(node):
        return bytes_of(node)
    return math.prod(leaf.shape) * max(4, jnp.dtype(leaf.dtype).itemsize)


def _sharded_state(optimizer, params: Any) -> Any:
    """Returns the state's shapes with shardings; None where those are not known."""
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    named = [x for x in shardings if isinstance(x, NamedSharding)]
    if not named or len(named) < len(shardings):
        return None
    mesh = named[0].mesh
    explicit = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )

    # Tracers know their shardings under explicit axis types only.
    def typed(leaf):
        sharding = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(explicit):
        return jax.eval_shape(lambda p: optimizer.init(p), jax.tree.map(typed, params))


def _shard_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = tuple(leaf.shape) if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize


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


def _text(size: int) -> str:
    """Returns bytes with a unit of 1000, to three digits or more."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"
