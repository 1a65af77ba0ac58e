"""``scale_by_low_rank``: any Optax transformation, run inside a low-rank subspace.

Every method of this library is a choice of five parts around an inner transformation:

===========  =================  ==========  ======================  ====================
method       basis              rank        refresh                 re-basing
===========  =================  ==========  ======================  ====================
GaLore       exact_svd          fixed       every(200)              keep
AdaRankGrad  range_finder       by energy   on_convergence          a non-negative rule
===========  =================  ==========  ======================  ====================

with Adam inside. This module is the only place where the parts meet.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases import BasisRule, range_finder
from lowrank_optax.matrices import DimensionNumbers, MatrixView, Side
from lowrank_optax.moments import Kind, Moment, locate_moments
from lowrank_optax.plan import LeafPlan, announce, plan_leaves
from lowrank_optax.ranks import RankRule, as_rank_rule
from lowrank_optax.rebase import RebaseRule, as_rebase_rule, transfer
from lowrank_optax.refresh import RefreshRule, Trend, every
from lowrank_optax.sharding import (
    basis_axes,
    coordinate_axes,
    stack_axes,
    with_automatic_axes,
    zeros_beside,
)


class Subspace(NamedTuple):
    """The subspace of one leaf: one basis per matrix of its stack.

    Attributes:
        basis: P, orthonormal columns, zero at and above the rank; (*stack, b,
            capacity), float32 (float64 for float64 parameters). All zero before the
            first usable gradient.
        rank: Columns in use; (*stack,), int32.
        demand: Columns asked for, smoothed by the rank rule; (*stack,), float32.
        age: Updates since the refresh; (*stack,), int32.
        refreshes: Refreshes so far; (*stack,), int32.
        trend: State of the refresh rule; a pytree, () for most.
    """

    basis: jax.Array
    rank: jax.Array
    demand: jax.Array
    age: jax.Array
    refreshes: jax.Array
    trend: Any


class LowRankState(NamedTuple):
    """State of :func:`scale_by_low_rank`.

    Attributes:
        count: Updates done; (), int32.
        subspaces: Tree like the parameters with a :class:`Subspace` for each projected
            leaf, ``optax.MaskedNode()`` for each other one.
        inner_state: State of the inner transformation for a tree like the parameters in
            which a projected leaf has shape (*stack, a, capacity).
    """

    count: jax.Array
    subspaces: Any
    inner_state: Any


class _Parts(NamedTuple):
    inner: optax.GradientTransformationExtraArgs
    rank: RankRule
    basis: BasisRule
    refresh: RefreshRule
    rebase: RebaseRule
    side: Side
    dimension_numbers: DimensionNumbers | None
    scale: jax.typing.ArrayLike
    moments: Mapping[str, Kind]
    seed: jax.typing.ArrayLike


def scale_by_low_rank(
    inner: optax.GradientTransformation,
    rank: int | RankRule = 128,
    *,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    scale: jax.typing.ArrayLike = 1.0,
    moments: Mapping[str, Kind] | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on each gradient matrix inside a low-rank subspace of it.

    For a gradient matrix oriented to G_t (a, b), its projected side last, and the basis
    P (b, r) in use:

    .. math::
        R_t = G_t P, \quad N_t = \mathrm{inner}(R_t), \quad
        U_t = \mathrm{scale} \cdot N_t P^\top

    On a refresh P becomes a basis of the current gradient, and the moments inside
    ``inner`` follow by P_old^T P_new under the ``rebase`` rule, before R_t is computed.
    Stacked leaves (scanned layers, experts) are treated matrix by matrix: each gets the
    update that it would get alone. Leaves without a matrix whose short side is above
    the rank pass to ``inner`` at full size, and come out as ``inner`` makes them.

    Stored per projected matrix: b * r numbers (the basis) and a * r for each moment of
    ``inner``, in float32, and a few scalars. An update costs 4 a b r flops beside what
    ``inner`` does to an (a, r) matrix; a refresh costs what the basis rule says.

    Args:
        inner: Transformation of gradients that needs no parameters, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)``, ``optax.scale_by_lion()``,
            ``optax.scale_by_rms()``, ``optax.contrib.scale_by_muon(...)`` (whose own
            ``weight_dimension_numbers`` must fit (*stack, a, r)).
        rank: Columns r of the bases, >= 1, or a rule such as
            :func:`lowrank_optax.energy_rank`.
        basis: :func:`lowrank_optax.range_finder` (None) or
            :func:`lowrank_optax.exact_svd`.
        refresh: :func:`lowrank_optax.every`, ``every(200)`` if None, or
            :func:`lowrank_optax.on_convergence`.
        rebase: Name of a rule in ``lowrank_optax.REBASE_RULES``, or a rule.
        side: Which side of each matrix is projected. "short", b = min(n, m), keeps more
            of a gradient's energy; "long" stores less, b r + 2 a r with a = min(n, m).
        dimension_numbers: Which axes of a leaf form its matrix: a tree like the
            parameters of ``LowRankDimensionNumbers`` (None: leave the leaf at full
            size), or a function from the parameters (or gradients: only their shapes
            count) to such a tree. None: ``lowrank_optax.dimension_numbers_by_shape``.
        scale: Factor on the updates of projected leaves (GaLore's alpha).
        moments: What the fields of ``inner``'s state are, for transformations that the
            library does not know: name -> "first", "second" or "constant".
        seed: Seed of the random sketches. A draw is a function of the seed, the leaf's
            path and the number of the refresh: resuming repeats it bit for bit, and
            another leaf changes nothing in it.

    Returns:
        A transformation whose updates have the gradients' shapes and, for projected
        leaves, their dtypes. Its ``update`` ignores ``params``.

    Raises:
        TypeError: If ``rank`` is neither an int nor a rule.
        ValueError: If a rank, side or rule is unknown; in ``init``, if ``inner`` needs
            parameters, has a state that no re-basing rule knows, or dimension numbers
            do not fit a leaf; in ``update``, if a gradient does not fit the state.

    Example:
        A basis of rank 2 and moments of 2 columns instead of 16:

        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = scale_by_low_rank(optax.scale_by_adam(), rank=2)
        >>> state = tx.init(params)
        >>> state.subspaces["w"].basis.shape, state.inner_state.nu["w"].shape
        ((16, 2), (64, 2))

    References:
        GaLore (https://arxiv.org/abs/2403.03507), AdaRankGrad
        (https://arxiv.org/abs/2410.17881). :func:`lowrank_optax.galore` and
        :func:`lowrank_optax.adarankgrad` say where they differ.
    """
    if side not in ("short", "long"):
        raise ValueError(f"side must be 'short' or 'long', got {side!r}.")
    parts = _Parts(
        inner=optax.with_extra_args_support(inner),
        rank=as_rank_rule(rank),
        basis=range_finder() if basis is None else basis,
        refresh=every(200) if refresh is None else refresh,
        rebase=as_rebase_rule(rebase),
        side=side,
        dimension_numbers=dimension_numbers,
        scale=scale,
        moments=moments or {},
        seed=seed,
    )

    def init_fn(params):
        return _init(params, parts)

    def update_fn(updates, state, params=None, **extra_args):
        del params

        def update(updates, state):
            return _update(updates, state, parts, extra_args)

        return with_automatic_axes(update, (updates, state), updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _plans(tree: Any, parts: _Parts, capacity: int) -> dict[tuple, LeafPlan]:
    return plan_leaves(tree, capacity, parts.side, parts.dimension_numbers)


def _init(params: Any, parts: _Parts) -> LowRankState:
    plans = _plans(params, parts, parts.rank.capacity)
    announce(plans)

    def subspace(path, leaf):
        view, capacity = plans[path].view, plans[path].capacity
        if view is None or not plans[path].is_projected:
            return optax.MaskedNode()
        return _initial_subspace(leaf, view, capacity, parts.refresh)

    def coordinates(path, leaf):
        view, capacity = plans[path].view, plans[path].capacity
        if view is None or not plans[path].is_projected:
            return leaf
        shape = (*view.stack, view.kept_size, capacity)
        return zeros_beside(leaf, shape, _dtype(leaf), coordinate_axes(view))

    in_subspace = jax.tree_util.tree_map_with_path(coordinates, params)
    inner_state = parts.inner.init(in_subspace)
    if plans:
        _check_inner(parts, in_subspace, inner_state, plans)
    subspaces = jax.tree_util.tree_map_with_path(subspace, params)
    return LowRankState(jnp.zeros([], jnp.int32), subspaces, inner_state)


def _dtype(leaf) -> jnp.dtype:
    """Returns the dtype of the linear algebra for a leaf: float32 at least."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _initial_subspace(leaf, view: MatrixView, capacity: int, refresh) -> Subspace:
    stack = view.stack

    def per_matrix(dtype):
        return zeros_beside(leaf, stack, dtype, stack_axes(view))

    shape = (*stack, view.projected_size, capacity)
    return Subspace(
        basis=zeros_beside(leaf, shape, _dtype(leaf), basis_axes(view)),
        rank=per_matrix(jnp.int32) + capacity,
        demand=per_matrix(jnp.float32) + capacity,
        age=per_matrix(jnp.int32),
        refreshes=per_matrix(jnp.int32),
        trend=refresh.init(per_matrix),
    )


def _check_inner(parts: _Parts, in_subspace, inner_state, plans) -> None:
    """Raises if ``inner`` needs parameters, or keeps what no rule can re-base."""
    shapes = {
        path: (*plan.view.stack, plan.view.kept_size, plan.capacity)
        for path, plan in plans.items()
        if plan.is_projected and plan.view is not None
    }
    others = {path for path, plan in plans.items() if not plan.is_projected}
    locate_moments(inner_state, shapes, others, parts.moments)

    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (in_subspace, inner_state)
    )
    try:
        jax.eval_shape(lambda u, s: parts.inner.update(u, s, None), *like)
    except Exception as error:
        # Only if parameters are what was missing: other faults surface in update.
        try:
            jax.eval_shape(lambda u, s: parts.inner.update(u, s, u), *like)
        except Exception:
            return
        raise ValueError(
            "the inner transformation of scale_by_low_rank needs parameters, which "
            "have no meaning in the subspace; put weight decay and the like outside: "
            "optax.chain(scale_by_low_rank(optax.scale_by_adam(), ...), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))."
        ) from error


def _update(updates, state: LowRankState, parts: _Parts, extra_args):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    paths = [path for path, _ in leaves]
    nodes = treedef.flatten_up_to(state.subspaces)
    subspaces = dict(zip(paths, map(_record, nodes), strict=True))
    projected = [path for path in paths if isinstance(subspaces[path], Subspace)]
    gradients = dict(leaves)
    views = _views(updates, subspaces, projected, parts)
    shapes = {
        path: (
            *views[path].stack,
            views[path].kept_size,
            subspaces[path].basis.shape[-1],
        )
        for path in projected
    }
    moments = locate_moments(
        state.inner_state, shapes, set(paths) - set(projected), parts.moments
    )

    inner_leaves, inner_treedef = jax.tree.flatten(state.inner_state)
    coordinates = dict(gradients)
    for position, path in enumerate(projected):
        subspaces[path], rebased = _refresh(
            gradients[path],
            subspaces[path],
            [inner_leaves[moment.index] for moment in moments[path]],
            view=views[path],
            kinds=moments[path],
            key=_leaf_key(parts.seed, path),
            fraction=position / len(projected),
            count=state.count,
            parts=parts,
        )
        for moment, array in zip(moments[path], rebased, strict=True):
            inner_leaves[moment.index] = array
        coordinates[path] = views[path].project(gradients[path], subspaces[path].basis)

    inner_updates, inner_state = parts.inner.update(
        treedef.unflatten([coordinates[path] for path in paths]),
        inner_treedef.unflatten(inner_leaves),
        None,
        **extra_args,
    )

    new_updates = dict(zip(paths, treedef.flatten_up_to(inner_updates), strict=True))
    for path in projected:
        subspace = subspaces[path]
        new_updates[path] = _lifted(
            new_updates[path], gradients[path], subspace.basis, views[path], parts.scale
        )
        subspaces[path] = _aged(subspace, coordinates[path], parts.refresh)
    new_state = LowRankState(
        jnp.asarray(optax.safe_increment(state.count)),
        treedef.unflatten([subspaces[path] for path in paths]),
        inner_state,
    )
    return treedef.unflatten([new_updates[path] for path in paths]), new_state


def _record(node: Any) -> Any:
    """Returns a subspace again where ``flax.nnx.Optimizer`` has made it a mapping."""
    if isinstance(node, Subspace) or not jax.tree.leaves(node):
        return node
    if not isinstance(node, Mapping):
        raise ValueError(
            "the state's subspaces must be Subspace or, for a leaf at full size, "
            f"optax.MaskedNode(); got {type(node).__name__}."
        )
    fields = dict(node)
    trend = fields.pop("trend", ())
    trend = Trend(**trend) if isinstance(trend, Mapping) else trend
    return Subspace(**fields, trend=trend)


def _views(updates, subspaces, projected, parts: _Parts) -> dict[tuple, MatrixView]:
    """Returns the view of each projected leaf; the state says which those are."""
    # A capacity of 0 plans every leaf with a matrix; the state's own shapes decide.
    plans = _plans(updates, parts, 0)
    views = {}
    for path in projected:
        view, basis = plans[path].view, subspaces[path].basis
        if view is None or basis.shape[:-1] != (*view.stack, view.projected_size):
            raise ValueError(
                f"{plans[path].path}: the gradient's shape {plans[path].shape} does "
                f"not fit a basis of shape {basis.shape}; was the state made for other "
                "parameters, side or dimension_numbers?"
            )
        views[path] = view
    return views


def _leaf_key(seed, path) -> jax.Array:
    name = jax.tree_util.keystr(path)
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def _refresh(
    gradient: jax.Array,
    subspace: Subspace,
    moments: list[jax.Array],
    *,
    view: MatrixView,
    kinds: list[Moment],
    key: jax.Array,
    fraction: float,
    count: jax.Array,
    parts: _Parts,
) -> tuple[Subspace, list[jax.Array]]:
    """Returns the subspace and moments, renewed for the matrices that are due.

    The condition is on the whole stack, outside any batching: a conditional inside
    vmap would compute a basis at every step.
    """
    is_first = subspace.refreshes == 0
    is_due = is_first | parts.refresh.is_due(subspace.age, subspace.trend)

    def renewed():
        matrix = view.oriented(gradient).astype(subspace.basis.dtype)
        peak = jnp.max(jnp.abs(matrix), axis=(-1, -2))
        has_signal = jnp.isfinite(peak) & (peak > 0)
        is_usable = is_due & has_signal
        factor = parts.basis.compute(
            matrix,
            jnp.where(has_signal, peak, 1),
            subspace.basis,
            _refresh_keys(key, subspace.refreshes),
        )
        rank, demand = parts.rank.select(factor.energies, subspace.demand)
        columns = factor.columns
        position = jax.lax.broadcasted_iota(jnp.int32, columns.shape, columns.ndim - 1)
        columns = jnp.where(position < rank[..., None, None], columns, 0)
        is_usable &= jnp.all(jnp.isfinite(columns), axis=(-1, -2))
        first_age = jnp.where(is_first, parts.refresh.first_age(fraction), 0)
        new = Subspace(
            basis=columns.astype(subspace.basis.dtype),
            rank=rank,
            demand=demand,
            age=first_age.astype(jnp.int32),
            refreshes=subspace.refreshes + 1,
            trend=subspace.trend,
        )
        new = _where(is_usable, new, subspace)
        rebased = _rebased(moments, kinds, subspace.basis, new.basis, count, parts)
        # Before the first basis there is nothing to follow: an initial value stays.
        return new, _where(is_usable & ~is_first, rebased, moments)

    return jax.lax.cond(jnp.any(is_due), renewed, lambda: (subspace, moments))


def _refresh_keys(key: jax.Array, refreshes: jax.Array) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(key, refreshes.reshape(-1)).reshape(refreshes.shape)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects per matrix of the stack, leaf by leaf."""

    def select(x, y):
        axes = tuple(range(condition.ndim, y.ndim))
        return jnp.where(jnp.expand_dims(condition, axes), x, y)

    return jax.tree.map(select, new, old)


def _rebased(moments, kinds, old_basis, new_basis, count, parts) -> list[jax.Array]:
    r = transfer(old_basis, new_basis)
    wide = [moment.astype(r.dtype) for moment in moments]
    firsts = [
        x for x, moment in zip(wide, kinds, strict=True) if moment.kind == "first"
    ]

    def follow(moment, kind):
        if kind == "first":
            return parts.rebase.first(moment, r)
        mean = firsts[0] if firsts else jnp.zeros_like(moment)
        return parts.rebase.second(moment, mean, r, count)

    return [
        follow(x, kind).astype(moment.dtype)
        for x, (_, kind), moment in zip(wide, kinds, moments, strict=True)
    ]


def _lifted(inner_update, gradient, basis, view: MatrixView, scale) -> jax.Array:
    # The scale goes on the small factor.
    scaled = inner_update.astype(basis.dtype) * jnp.asarray(scale, basis.dtype)
    return view.lift(scaled, basis).astype(gradient.dtype)


def _aged(subspace: Subspace, coordinates: jax.Array, refresh: RefreshRule) -> Subspace:
    # Before the first usable gradient there is no basis that could age.
    has_basis = subspace.refreshes > 0
    age = subspace.age + has_basis.astype(jnp.int32)
    norm = jnp.linalg.norm(coordinates.astype(jnp.float32), axis=(-1, -2))
    trend = refresh.observe(jnp.maximum(age, 1), subspace.trend, norm)
    return subspace._replace(age=age, trend=trend)
