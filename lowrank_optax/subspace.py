"""The subspace of one leaf: its state, and how gradients go into it and come out.

Project, lift, refresh and age are functions of their own, shared by ``update``, by
accumulation, and by whatever computes gradients in the subspace.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.bases import BasisRule, captured_energies
from lowrank_optax.coded import coded_record, decode, encode, shape_of
from lowrank_optax.matrices import DimensionNumbers, MatrixView, Side
from lowrank_optax.moments import Kind, Moment
from lowrank_optax.plan import LeafPlan, plan_leaves
from lowrank_optax.random_bases import RandomBasis
from lowrank_optax.ranks import RankRule
from lowrank_optax.rebase import RebaseRule, random_transfer, transfer
from lowrank_optax.refresh import RefreshRule, Trend
from lowrank_optax.sharding import basis_axes, stack_axes, zeros_beside


class Subspace(NamedTuple):
    """The subspace of one leaf: one basis per matrix of its stack.

    Attributes:
        basis: P, orthonormal columns, zero at and above the rank; (*stack, b/c,
            capacity), float32 (float64 for float64 parameters). All zero before the
            first usable gradient. () for a random basis, which is not stored; a
            :class:`Coded` one in few bits.
        rank: Columns in use; (*stack,), int32.
        demand: Columns asked for, smoothed by the rank rule; (*stack,), float32.
        age: Updates since the refresh; (*stack,), int32.
        refreshes: Refreshes so far; (*stack,), int32.
        trend: State of the refresh rule; a pytree, () for most.
    """

    basis: Any
    rank: jax.Array
    demand: jax.Array
    age: jax.Array
    refreshes: jax.Array
    trend: Any


class Parts(NamedTuple):
    """The choices that make a subspace; see :func:`scale_by_low_rank`.

    Attributes:
        needs_full_gradients: Whether the core looks at more than projected gradients.
    """

    rank: RankRule
    basis: BasisRule | RandomBasis
    refresh: RefreshRule
    rebase: RebaseRule
    side: Side
    granularity: int
    dimension_numbers: DimensionNumbers | None
    moments: Mapping[str, Kind]
    seed: jax.typing.ArrayLike
    needs_full_gradients: bool = False

    @property
    def is_random(self) -> bool:
        """Whether bases are drawn, and not stored."""
        return isinstance(self.basis, RandomBasis)


@dataclasses.dataclass(frozen=True)
class Projector:
    """How one leaf goes into its subspace, and how that is renewed.

    Attributes:
        parts: Of the transformation.
        view: The leaf as matrices.
        capacity: Columns of the bases, of coordinates and of moments.
        path: Key path of the leaf.
        fraction: Position of the leaf among the projected ones, in [0, 1).
        dtype: Of the linear algebra: float32, or wider for a wider leaf.
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

    def initial(self, leaf: Any) -> Subspace:
        """Returns the subspace before the first gradient, sharded as the leaf is."""

        def per_matrix(dtype):
            return zeros_beside(leaf, self.view.stack, dtype, stack_axes(self.view))

        basis = ()
        if not self.parts.is_random:
            axes = basis_axes(self.view)
            basis = zeros_beside(leaf, self.basis_shape, self.dtype, axes)
        return Subspace(
            basis=basis,
            rank=per_matrix(jnp.int32) + self.capacity,
            demand=per_matrix(jnp.float32) + self.capacity,
            age=per_matrix(jnp.int32),
            refreshes=per_matrix(jnp.int32),
            trend=self.parts.refresh.init(per_matrix),
        )

    def basis(self, subspace: Subspace) -> jax.Array:
        """Returns P (*stack, b/c, r), drawn where it is not stored."""
        rule = self.parts.basis
        if not isinstance(rule, RandomBasis):
            return decode(subspace.basis)
        return self._drawn(rule, subspace.refreshes - 1)

    def refresh(
        self,
        gradient: jax.Array,
        subspace: Subspace,
        moments: list[Any],
        kinds: Sequence[Moment],
        count: jax.Array,
        turn: jax.typing.ArrayLike,
    ) -> tuple[Subspace, list[Any]]:
        """Returns subspace and moments, renewed for the matrices that are due.

        The condition is on the whole stack, outside any batching: a conditional inside
        vmap would compute a basis at every step.

        Args:
            gradient: Of the leaf, at full size.
            subspace: Its state.
            moments: Its moments in the inner state, in few bits or not.
            kinds: What each of them is.
            count: Updates done.
            turn: Whether anything may be refreshed now; (), bool.
        """
        is_first = subspace.refreshes == 0
        is_due = is_first | self.parts.refresh.is_due(subspace.age, subspace.trend)

        def renewed():
            first_age = self.parts.refresh.first_age(self.fraction)
            new = subspace._replace(
                age=jnp.where(is_first, first_age, 0).astype(jnp.int32),
                refreshes=subspace.refreshes + 1,
            )
            rule = self.parts.basis
            if isinstance(rule, RandomBasis):
                usable = is_due
                # Drawn together: half the program to compile.
                numbers = jnp.stack([subspace.refreshes, new.refreshes]) - 1
                r = random_transfer(*self._drawn(rule, numbers))
            else:
                new, usable = self._computed(rule, gradient, new, is_due)
                r = transfer(decode(subspace.basis), decode(new.basis))
                # What is selected below then waits for r: it is written over the old
                # basis, which XLA would copy at every update if r might still need it.
                usable &= jnp.all(jnp.isfinite(r), axis=(-1, -2))
            wide = [decode(moment) for moment in moments]
            rebased = _rebased(wide, kinds, r, count, self.parts.rebase)
            rebased = [encode(x, old) for x, old in zip(rebased, moments, strict=True)]
            # Before the first basis there is nothing to follow.
            rebased = _where(usable & ~is_first, rebased, moments)
            return _where(usable, new, subspace), rebased

        any_due = turn & jnp.any(is_due)
        return jax.lax.cond(any_due, renewed, lambda: (subspace, moments))

    def _computed(
        self, rule: BasisRule, gradient, subspace, is_due
    ) -> tuple[Subspace, jax.Array]:
        """Returns the subspace with a basis of the gradient, and where it is usable."""
        matrix = self.view.oriented(gradient).astype(self.dtype)
        keys = self._keys(subspace.refreshes - 1)
        columns = rule.compute(matrix, decode(subspace.basis), keys)
        # By squares, which keep NaN: XLA's maximum may pass over it (jaxlib 0.10 and
        # 0.11, CPU).
        squares = jnp.sum(columns**2, axis=-2)
        found = jnp.all(jnp.isfinite(squares) & (squares > 0), axis=-1)
        # A product with the gradient, which the compiler drops for a fixed rank.
        energies = captured_energies(matrix, columns)
        rank, demand = self.parts.rank.select(energies, subspace.demand)
        position = jax.lax.broadcasted_iota(jnp.int32, columns.shape, columns.ndim - 1)
        columns = jnp.where(position < rank[..., None, None], columns, 0)
        basis = encode(columns.astype(self.dtype), subspace.basis)
        new = subspace._replace(basis=basis, rank=rank, demand=demand)
        return new, is_due & found

    def _drawn(self, rule: RandomBasis, numbers: jax.Array) -> jax.Array:
        """Returns the random bases with these numbers, (*numbers.shape, b/c, r)."""
        shape = (self.view.projected_size, self.capacity)
        return rule.draw(self._keys(numbers), shape, self.dtype)

    def _keys(self, numbers: jax.Array) -> jax.Array:
        """Returns the key of each basis: of the seed, the path and its number."""
        name = jax.tree_util.keystr(self.path)
        key = jax.random.key(self.parts.seed)
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        return fold(key, numbers.reshape(-1)).reshape(numbers.shape)

    def aged(self, subspace: Subspace, coordinates: jax.Array) -> Subspace:
        """Returns the subspace after an update with these coordinates."""
        # Before the first usable gradient there is no basis that could age.
        has_basis = subspace.refreshes > 0
        age = subspace.age + has_basis.astype(jnp.int32)
        norm = jnp.linalg.norm(coordinates.astype(jnp.float32), axis=(-1, -2))
        observe = self.parts.refresh.observe
        trend = observe(jnp.maximum(age, 1), subspace.trend, norm)
        return subspace._replace(age=age, trend=trend)


def initial_projectors(
    params: Any, parts: Parts
) -> tuple[dict[tuple, LeafPlan], dict[tuple, Projector]]:
    """Returns the plan of every leaf and the projector of each projected one."""
    plans = _plans(params, parts, parts.rank.capacity)
    leaves = dict(jax.tree.leaves_with_path(params))
    projected = [path for path, plan in plans.items() if plan.is_projected]
    capacities = {path: plans[path].capacity for path in projected}
    return plans, _projectors(leaves, plans, capacities, parts)


def projectors_of_state(
    leaves: Mapping[tuple, Any],
    tree: Any,
    subspaces: Mapping[tuple, Subspace],
    parts: Parts,
) -> dict[tuple, Projector]:
    """Returns the projector of each leaf that has a subspace in the state.

    The capacity is that of the state's arrays, not the one that the rank rule would
    allocate; random bases, which have none, take the rule's.

    Args:
        leaves: Key path -> leaf at full size, or its shape, of all leaves.
        tree: The same as a tree.
        subspaces: Key path -> subspace, of the projected leaves.
        parts: Of the transformation.

    Raises:
        ValueError: If a leaf does not fit its subspace.
    """
    # A capacity of 0 plans every leaf with a matrix; the state's own shapes decide.
    plans = _plans(tree, parts, 0)
    capacities = {}
    for path, subspace in subspaces.items():
        view = plans[path].view
        if parts.is_random:
            fits = view is not None and subspace.rank.shape == view.stack
            shape = subspace.rank.shape
            capacities[path] = parts.rank.capacity
        else:
            shape = shape_of(subspace.basis)
            side = () if view is None else (*view.stack, view.projected_size)
            fits = view is not None and shape[:-1] == side
            capacities[path] = shape[-1]
        if not fits:
            raise ValueError(
                f"{plans[path].path}: the gradient's shape {plans[path].shape} does "
                f"not fit a basis of shape {shape}; was the state made for other "
                "parameters, side, granularity or dimension_numbers?"
            )
    return _projectors(leaves, plans, capacities, parts)


def _plans(tree: Any, parts: Parts, capacity: int) -> dict[tuple, LeafPlan]:
    return plan_leaves(
        tree, capacity, parts.side, parts.dimension_numbers, parts.granularity
    )


def _projectors(leaves, plans, capacities, parts: Parts) -> dict[tuple, Projector]:
    return {
        path: Projector(
            parts=parts,
            view=plans[path].view,
            capacity=capacity,
            path=path,
            fraction=position / len(capacities),
            dtype=jnp.promote_types(leaves[path].dtype, jnp.float32),
        )
        for position, (path, capacity) in enumerate(capacities.items())
    }


def subspace_record(node: Any) -> Any:
    """Returns a subspace again where ``flax.nnx.Optimizer`` has made it a mapping."""
    if isinstance(node, Subspace) or not jax.tree.leaves(node):
        return node
    if not isinstance(node, Mapping):
        raise ValueError(
            "the state's subspaces must be Subspace or, for a leaf at full size, "
            f"optax.MaskedNode(); got {type(node).__name__}."
        )
    fields = {"basis": (), "trend": (), **node}
    trend, basis = fields.pop("trend"), coded_record(fields.pop("basis"))
    trend = Trend(**trend) if isinstance(trend, Mapping) and trend else trend
    return Subspace(basis=basis, **fields, trend=trend)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects per matrix of the stack, leaf by leaf."""

    def select(x, y):
        axes = tuple(range(condition.ndim, y.ndim))
        return jnp.where(jnp.expand_dims(condition, axes), x, y)

    return jax.tree.map(select, new, old)


def _rebased(moments, kinds, r, count, rebase: RebaseRule) -> list[jax.Array]:
    wide = [moment.astype(r.dtype) for moment in moments]
    firsts = [
        x for x, moment in zip(wide, kinds, strict=True) if moment.kind == "first"
    ]

    def follow(moment, kind):
        if kind == "first":
            return rebase.first(moment, r)
        mean = firsts[0] if firsts else jnp.zeros_like(moment)
        return rebase.second(moment, mean, r, count)

    return [
        follow(x, kind).astype(moment.dtype)
        for x, (_, kind), moment in zip(wide, kinds, moments, strict=True)
    ]
