"""The subspace of one leaf: its state, its basis, and its projector."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.codes import decode, shape_of
from lowrank_optax.matrix.arrays import leaf_name, wide
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.matrix.plan import LeafPlan
from lowrank_optax.matrix.sharding import coordinate_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.parts import Parts
from lowrank_optax.rules.dct_columns import DctColumns
from lowrank_optax.rules.hashing import hashed, hashed_seed
from lowrank_optax.rules.random_bases import RandomBasis


class Subspace(NamedTuple):
    """The subspace of one leaf: one basis per matrix of its stack.

    Attributes:
        basis: P, with orthonormal columns that are zero at and above the rank; (*stack,
            b/c, capacity), float32 (float64 for float64 parameters). All columns are
            zero before the first usable gradient. A random basis is not stored, ().
            In few bits the basis is a :class:`Coded`. Of
            :func:`lowrank_optax.dct_columns` it is column numbers, (*stack, 1,
            capacity), int32, with -1 for a zero column.
        rank: Columns in use; (*stack,), int32.
        demand: Demanded columns, smoothed by the rank rule; (*stack,), float32.
        age: Updates since the refresh; (*stack,), int32. With staggered refreshes the
            first age counts from where the leaf stands in the interval.
        refreshes: Refreshes so far; (*stack,), int32.
        failures: Refreshes in a row that found no basis; (*stack,), int32.
        trend: State of the refresh rule; a pytree, () for most.
        residual: State of the residual rule; a pytree, () for most.
    """

    basis: Any
    rank: jax.Array
    demand: jax.Array
    age: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    trend: Any
    residual: Any


class ScaleByLowRankState(NamedTuple):
    """State of :func:`scale_by_low_rank`.

    Attributes:
        count: Updates done; (), int32.
        subspaces: Tree like the parameters, with a :class:`Subspace` for each projected
            leaf and ``optax.MaskedNode()`` for any other leaf.
        inner_state: State of the inner transformation, for a tree like the parameters
            where a projected leaf has shape (*stack, a*c, capacity).
    """

    count: jax.Array
    subspaces: Any
    inner_state: Any


@dataclasses.dataclass(frozen=True)
class Projector:
    """The projection of one leaf into its subspace, and the lift out of it.

    Attributes:
        parts: Parts of the transformation.
        view: The leaf as matrices.
        capacity: Columns of bases, coordinates and moments.
        path: Key path of the leaf.
        fraction: Position of the leaf among the projected leaves, in [0, 1).
        dtype: Dtype of the linear algebra: float32, or wider for a wider leaf.
    """

    parts: Parts
    view: MatrixView
    capacity: int
    path: tuple
    fraction: float
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (*stack, a*c, r) of coordinates and moments."""
        return (*self.view.stack, self.view.kept_size, self.capacity)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """Shape (*stack, b/c, r) of the basis."""
        return (*self.view.stack, self.view.projected_size, self.capacity)

    def coordinates_beside(self, leaf: Any) -> jax.Array:
        """Returns zeros like the coordinates, with the leaf's sharding."""
        return zeros_beside(leaf, self.shape, self.dtype, coordinate_axes(self.view))

    def basis(self, subspace: Subspace) -> jax.Array:
        """Returns P (*stack, b/c, r): stored, made from its numbers, or drawn."""
        if not self.parts.is_random:
            return self.columns_of(subspace.basis)
        return self.drawn(subspace.refreshes - 1, self.name_hash)

    def columns_of(self, basis: Any) -> jax.Array:
        """Returns P (*stack, b/c, r) of what a state holds as a basis."""
        if isinstance(self.parts.basis, DctColumns):
            return self.parts.basis.columns(basis, self.basis_shape[-2], self.dtype)
        return decode(basis)

    def drawn(self, numbers: jax.Array, name_hash: jax.typing.ArrayLike) -> jax.Array:
        """Returns the random bases of these refreshes, (*numbers.shape, b/c, r).

        Args:
            numbers: Numbers of the refreshes; (..., *stack).
            name_hash: :attr:`name_hash` of this leaf, or of a leaf of the same kind.
        """
        assert isinstance(self.parts.basis, RandomBasis)
        shape = (self.view.projected_size, self.capacity)
        # This kind of key draws the same in a batch as alone; other kinds do not.
        key = jax.random.key(self.parts.seed, impl="threefry2x32")
        key = jax.random.fold_in(key, name_hash)
        folded = jnp.broadcast_to(key, numbers.shape).reshape(-1)
        for number in (self._positions, numbers):
            each = jnp.broadcast_to(number, numbers.shape).reshape(-1)
            folded = jax.vmap(jax.random.fold_in)(folded, each)
        return self.parts.basis.draw(folded.reshape(numbers.shape), shape, self.dtype)

    @property
    def name_hash(self) -> int:
        """Number of the leaf for random draws: a function of its path alone."""
        return zlib.crc32(jax.tree_util.keystr(self.path).encode())

    def seeds(self, numbers: jax.Array, name_hash: jax.typing.ArrayLike) -> jax.Array:
        """Returns a seed for each basis; (*stack,), uint32.

        The seed is a function of the transformation's seed, the leaf's path, the
        position in the stack and the number of the refresh.

        Args:
            numbers: Numbers of the refreshes; (*stack,).
            name_hash: :attr:`name_hash` of this leaf, or of a leaf of the same kind.
        """
        start = hashed_seed(self.parts.seed)
        start = hashed(start ^ jnp.asarray(name_hash, jnp.uint32))
        start = hashed(start + self._positions)
        return hashed(start + numbers.astype(jnp.uint32))

    @property
    def _positions(self) -> jax.Array:
        """Positions in the stack, (*stack,), uint32."""
        count = math.prod(self.view.stack)
        return jnp.arange(count, dtype=jnp.uint32).reshape(self.view.stack)

    def aged(self, subspace: Subspace, coordinates: jax.Array) -> Subspace:
        """Returns the subspace after an update with these coordinates."""
        # Before the first usable gradient no basis can age.
        age = subspace.age + (subspace.refreshes > 0).astype(jnp.int32)
        trend = self.parts.refresh.observe(age, subspace.trend, coordinates)
        return subspace._replace(age=age, trend=trend)


def initial_projectors(
    params: Any, parts: Parts
) -> tuple[dict[tuple, LeafPlan], dict[tuple, Projector]]:
    """Returns the plan of every leaf, and the projector of each projected leaf."""
    plans = parts.plans(params, parts.rank.capacity)
    capacities = {path: x.capacity for path, x in plans.items() if x.is_projected}
    return plans, _projectors(leaves_by_path(params), plans, capacities, parts)


def projectors_of_state(
    plans: Mapping[tuple, LeafPlan],
    tree: Any,
    subspaces: Mapping[tuple, Subspace],
    parts: Parts,
) -> dict[tuple, Projector]:
    """Returns the projector of each leaf that has a subspace in the state.

    The capacity is that of the state's arrays, which may differ from the rank rule's
    capacity. Random bases have no array, and take the rule's capacity.

    Args:
        plans: Key path -> plan, for every leaf. Only the views count, not the ranks.
        tree: Leaves at full size, or their shapes.
        subspaces: Key path -> subspace, for the projected leaves.
        parts: Parts of the transformation.

    Raises:
        ValueError: If a leaf does not fit its subspace.
    """
    leaves, capacities = leaves_by_path(tree), {}
    for path, subspace in subspaces.items():
        if path not in plans:
            raise ValueError(
                f"{leaf_name(path)} has a subspace in the state and no "
                "gradient. Was the state made for other parameters? A function for "
                "labels or masks must not depend on the gradients: give "
                "optax.partition and optax.masked a tree made from the parameters."
            )
        view = plans[path].view
        if view is not None and not capacities:
            # All subspaces are made alike, so one check is enough.
            _check_rules(subspace, parts, plans[path].path, view, leaves[path])
        if parts.is_random:
            fits = view is not None and subspace.rank.shape == view.stack
            shape = subspace.rank.shape
            capacities[path] = parts.rank.capacity
        else:
            shape = shape_of(subspace.basis)
            rows = 1 if parts.is_numbered or view is None else view.projected_size
            side = () if view is None else (*view.stack, rows)
            fits = view is not None and shape[:-1] == side
            capacities[path] = shape[-1]
        if view is None or not fits:
            raise ValueError(
                f"{plans[path].path}: the gradient's shape {plans[path].shape} does "
                f"not fit a basis of shape {shape}; was the state made for other "
                "parameters, basis, side, granularity or dimension_numbers?"
            )
        most = min(view.kept_size, view.projected_size)
        if capacities[path] > most and not parts.is_random:
            raise ValueError(
                f"{plans[path].path}: a basis for a gradient of shape "
                f"{plans[path].shape} has at most {most} columns, not "
                f"{capacities[path]}; resize the state."
            )
    return _projectors(leaves, plans, capacities, parts)


def _check_rules(
    subspace: Subspace, parts: Parts, name: str, view: MatrixView, leaf: Any
) -> None:
    """Raises ValueError if a subspace lacks the arrays of the parts' rules."""
    # Without a sharding: inside an update the mesh differs from the leaf's mesh.
    bare = jax.ShapeDtypeStruct(view.shape, leaf.dtype)

    def kept():
        return {
            "basis": () if parts.is_random else jnp.zeros([]),
            "trend": parts.refresh.init(lambda dtype: jnp.zeros([], dtype)),
            "residual": parts.residual.init(view, bare),
        }

    for field, like in jax.eval_shape(kept).items():
        has = bool(jax.tree.leaves(getattr(subspace, field)))
        needs = bool(jax.tree.leaves(like))
        # Leftovers of another rule do no harm, except a basis: the moments are in it.
        if has < needs or (has > needs and field == "basis"):
            raise ValueError(
                f"{name}: the subspace in the state has {'a' if has else 'no'} "
                f"{field}, and this transformation keeps {'one' if needs else 'none'}; "
                "was the state made by another optimizer, or with another basis, "
                "refresh or residual rule?"
            )


def fraction_of(position: int, count: int) -> float:
    """Returns the position of one leaf among all projected leaves, in [0, 1)."""
    return position / count


def _projectors(leaves, plans, capacities, parts: Parts) -> dict[tuple, Projector]:
    return {
        path: Projector(
            parts=parts,
            view=plans[path].view,
            capacity=capacity,
            path=path,
            fraction=fraction_of(position, len(capacities)),
            dtype=wide(leaves[path].dtype),
        )
        for position, (path, capacity) in enumerate(capacities.items())
    }
