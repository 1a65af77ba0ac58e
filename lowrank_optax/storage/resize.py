"""Capacity: the columns of a state's arrays, cut or grown between two steps.

XLA's shapes are static, so a rank that falls inside ``update`` frees nothing. The
functions here run on the host, between two steps. ``update``, checkpoints and shardings
follow the shapes of the arrays; the next step is compiled for the new shapes.
"""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.binding.states import arrays_by_leaf, map_columns, stored_slots
from lowrank_optax.checks import as_count
from lowrank_optax.codes import bytes_of, is_coded, shape_of, with_columns
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.subspace import Subspace


class Columns(NamedTuple):
    """The columns of one projected leaf.

    Attributes:
        capacity: Columns of the leaf's arrays.
        rank: Columns in use, the largest number in the stack.
        demand: Smoothed demand of the rank rule, the largest number in the stack.
        side: Length b/c of the projected side. Column numbers do not show this length:
            of a :func:`lowrank_optax.dct_columns` basis it is one that is surely there.
        rows: Number a*c of rows of coordinates; None, if the inner transformation keeps
            no moments, so that no array shows this number.
        bytes_per_column: Bytes of one column, in all arrays of the leaf's state.
    """

    capacity: int
    rank: int
    demand: float
    side: int
    rows: int | None
    bytes_per_column: float

    @property
    def most(self) -> int:
        """Largest number of columns that a basis of the gradients can have."""
        return self.side if self.rows is None else min(self.side, self.rows)

    def wanted(self, bucket: int) -> int:
        """Returns the columns needed now: whole buckets, up to the capacity.

        Args:
            bucket: Columns; >= 1.
        """
        needed = max(self.rank, int(np.ceil(self.demand)), 1)
        return min(self.capacity, -(-needed // bucket) * bucket)


def capacities(state: Any) -> dict[str, int]:
    """Returns the number of columns of each leaf with a stored basis.

    Args:
        state: State of any optimizer that contains low-rank transformations; arrays or
            shapes.

    Returns:
        Key path of the parameter, as ``jax.tree_util.keystr`` writes it, -> columns.

    Example:
        >>> import lowrank_optax
        >>> state = lowrank_optax.galore(1e-2, rank=4).init({"w": jnp.ones((64, 16))})
        >>> capacities(state)
        {"['w']": 4}
    """
    return {
        leaf_name(path): shape_of(slot.basis)[-1]
        for path, slot in stored_slots(state).items()
    }


def resize(state: Any, ranks: SupportsIndex | Mapping[str, SupportsIndex]) -> Any:
    """Cuts or grows the arrays of projected leaves to the given numbers of columns.

    Columns at and above the rank in use are zero, so that a cut changes updates by
    rounding alone. New columns are zero until the leaf's next refresh. Shardings over a
    mesh stay the same. An array coded by :func:`lowrank_optax.low_bit` keeps the codes
    of the remaining columns.

    Args:
        state: State of any optimizer that contains low-rank transformations; arrays, or
            shapes, whose ranks in use are not checked. Not inside ``jax.jit``.
        ranks: Columns of every leaf with a stored basis, or {key path of the parameter:
            columns}, where other leaves stay as they are.

    Returns:
        The state with the new shapes. Arrays that do not change are not copied.

    Raises:
        ValueError: If a leaf is unknown or has no stored basis; if a number of columns
            is below the rank in use, or above the shorter side of the leaf's matrices.
            If the inner transformation keeps no moments, the state shows the projected
            side alone, and only the next update refuses columns above the other side.
            With column numbers the state shows the other side alone.

    Example:
        >>> import lowrank_optax
        >>> state = lowrank_optax.galore(1e-2, rank=4).init({"w": jnp.ones((64, 16))})
        >>> capacities(resize(state, 8))
        {"['w']": 8}
    """
    slots, arrays = stored_slots(state), arrays_by_leaf(state)
    by_name = {leaf_name(path): path for path in slots}
    by_leaf = ranks if isinstance(ranks, Mapping) else dict.fromkeys(by_name, ranks)
    wanted = {}
    for name, columns in by_leaf.items():
        if name not in by_name:
            raise ValueError(
                f"{name} has no stored basis in this state; those with one are "
                f"{', '.join(by_name) or 'none'}."
            )
        path = by_name[name]
        # Bases have the projected side as rows, coordinates the other side.
        lengths = [
            shape_of(x)[-2] for x in arrays[path].values() if not _is_numbered(x)
        ]
        most = min(lengths, default=None)
        wanted[path] = _as_columns(name, columns, slots[path], most)
    return resized(state, wanted)


def compact(
    state: Any,
    bucket: int = 16,
    *,
    peaks: Mapping[str, SupportsIndex] | None = None,
    min_saving: float = 0.0,
) -> Any:
    """Frees the columns that no matrix of a leaf uses, in whole buckets.

    Each leaf's capacity falls to the larger of its rank in use and the smoothed demand
    of its rank rule, rounded up to a multiple of ``bucket``. A capacity never rises,
    and a rank rule asks for no more than the columns that are left; :func:`resize`
    gives columns back.
    Leaves with a fixed rank use all their columns and stay as they are.

    Args:
        state: State of any optimizer that contains low-rank transformations. Not inside
            ``jax.jit``. The call reads ranks, and so waits for the device.
        bucket: Columns, >= 1. New capacities are multiples of ``bucket``, so that few
            programs are compiled, or what ``peaks`` asks where that is more.
        peaks: Key path -> least columns that the leaf keeps, such as the largest rank
            of the last updates.
        min_saving: Share of the state's bytes. If the call would free less, it frees
            nothing.

    Returns:
        The smaller state, or ``state`` itself if nothing is freed.

    Raises:
        ValueError: If ``bucket`` is no int, or below 1.
    """
    bucket = as_count("bucket", bucket)
    found = columns(state)
    smaller = {}
    for name, leaf in found.items():
        needed = max(leaf.wanted(bucket), operator.index((peaks or {}).get(name, 0)))
        if needed < leaf.capacity:
            smaller[name] = needed
    freed = sum(
        (found[name].capacity - k) * found[name].bytes_per_column
        for name, k in smaller.items()
    )
    if not smaller or freed < min_saving * bytes_of(state):
        return state
    return resize(state, smaller)


def columns(state: Any) -> dict[str, Columns]:
    """Returns the use and the bytes of columns, for each leaf with a stored basis.

    Args:
        state: Arrays. The call reads ranks and demands, and so waits for the device.
    """
    slots = stored_slots(state)
    read = jax.device_get([(x.rank, x.demand, _side(x)) for x in slots.values()])
    numbers = dict(zip(slots, read, strict=True))
    arrays = arrays_by_leaf(state)
    return {
        leaf_name(path): Columns(
            capacity=shape_of(slot.basis)[-1],
            rank=int(np.max(numbers[path][0])),
            demand=float(np.max(numbers[path][1])),
            side=int(numbers[path][2]),
            rows=_rows(arrays[path]),
            bytes_per_column=bytes_of(arrays[path]) / shape_of(slot.basis)[-1],
        )
        for path, slot in slots.items()
    }


def _is_numbered(node: Any) -> bool:
    """Returns whether an array holds column numbers in the place of columns."""
    return not is_coded(node) and jnp.issubdtype(node.dtype, jnp.integer)


def _side(slot: Subspace) -> Any:
    """Returns the length of the projected side; a lower bound from column numbers."""
    shape = shape_of(slot.basis)
    if not _is_numbered(slot.basis):
        return shape[-2]
    return jnp.maximum(jnp.max(slot.basis) + 1, shape[-1])


def _rows(arrays: Mapping[str, Any]) -> int | None:
    rows = (shape_of(x)[-2] for name, x in arrays.items() if name != "basis")
    return next(rows, None)


def _as_columns(name: str, columns: Any, slot: Subspace, most: int | None) -> int:
    """Returns a number of columns as an int, if a leaf may have as many."""
    columns = as_count(f"{name}: the number of columns", columns)
    if most is not None and columns > most:
        raise ValueError(
            f"{name}: a basis of this leaf has 1 to {most} columns, not {columns}."
        )
    if isinstance(slot.rank, jax.ShapeDtypeStruct):
        return columns
    rank = int(np.max(jax.device_get(slot.rank)))
    if columns < rank:
        raise ValueError(
            f"{name}: {columns} columns are below the rank in use, {rank}; give "
            f"{rank} or more."
        )
    return columns


def resized(state: Any, wanted: Mapping[tuple, int]) -> Any:
    """Returns a state with the wanted columns, by key path, and ranks cut to match."""

    def fit(path, field, node):
        del field
        is_other = path in wanted and shape_of(node)[-1] != wanted[path]
        return _with_columns(node, wanted[path]) if is_other else node

    def cut(path, slot: Subspace) -> Subspace:
        if path not in wanted or isinstance(slot.rank, jax.ShapeDtypeStruct):
            return slot
        least = wanted[path]
        if least >= shape_of(slot.basis)[-1]:
            return slot
        rank = jnp.minimum(slot.rank, least)
        demand = jnp.minimum(slot.demand, least)
        return slot._replace(
            rank=_beside(rank, slot.rank), demand=_beside(demand, slot.demand)
        )

    return map_columns(state, cut, fit)


def _with_columns(node: Any, columns: int) -> Any:
    """Returns an array with so many columns, with the sharding of the old array."""
    cut = with_columns
    arrays = [x for x in jax.tree.leaves(node) if isinstance(x, jax.Array)]
    if arrays and all(len(x.sharding.device_set) == 1 for x in arrays):
        # Jitted, for one program instead of one per operation.
        cut = jax.jit(with_columns, static_argnums=1)
    return _beside(cut(node, columns), node)


def _beside(new: Any, old: Any) -> Any:
    """Returns a resized array with the sharding of the old array, if it has one."""

    def put(x, y):
        has_both = isinstance(x, jax.Array) and isinstance(y, jax.Array)
        return jax.device_put(x, y.sharding) if has_both else x

    return jax.tree.map(put, new, old)
