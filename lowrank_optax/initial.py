"""The state before the first gradient, and the rank from a budget of bytes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.moments import check_is_not_centered, locate_moments
from lowrank_optax.binding.optimizer import announce, unheard
from lowrank_optax.codes import bytes_of
from lowrank_optax.core import Core, Views
from lowrank_optax.matrix.arrays import as_arrays, blank
from lowrank_optax.matrix.boxes import is_box, unboxed
from lowrank_optax.matrix.plan import views_of, warn_if_few_are_projected
from lowrank_optax.matrix.sharding import (
    basis_axes,
    on_mesh_of,
    stack_axes,
    zeros_beside,
)
from lowrank_optax.parts import Parts
from lowrank_optax.rules.budget import Budget, Size, as_stored, largest_fitting
from lowrank_optax.rules.ranks import FixedRank
from lowrank_optax.subspace import (
    Projector,
    ScaleByLowRankState,
    Subspace,
    initial_projectors,
)


def initial_state(params: Any, core: Core, parts: Parts) -> ScaleByLowRankState:
    """Returns the state of a transformation for parameters, or their shapes."""
    params = as_arrays(params)
    parts = _with_rank_of_budget(params, core, parts)
    plans, projectors = initial_projectors(params, parts)
    if not announce(plans, parts):
        warn_if_few_are_projected(plans)
    views = views_of(plans)
    state, in_subspace = _state(params, core, projectors, views)
    shapes = {path: projector.shape for path, projector in projectors.items()}
    if projectors:
        check_is_not_centered(state.inner_state, "moments follow a new basis")
    others, arrays = plans.keys() - shapes.keys(), unboxed(state.inner_state)
    locate_moments(arrays, shapes, others, parts.moments)
    core.check(unboxed(in_subspace), arrays, projectors, views)
    return state


def _with_rank_of_budget(params: Any, core: Core, parts: Parts) -> Parts:
    """Returns the parts with a rank in place of a budget of bytes."""
    if not isinstance(parts.rank, Budget):
        return parts

    def of_rank(rank: int) -> Parts:
        return parts._replace(rank=FixedRank(rank))

    def size_at(rank: int) -> Size:
        def init(params):
            plans, projectors = initial_projectors(params, of_rank(rank))
            return _state(params, core, projectors, views_of(plans))[0]

        with unheard():
            state = as_stored(jax.eval_shape(init, params), params)
        return Size(bytes_of(state), jax.tree.structure(state))

    return of_rank(largest_fitting(size_at, parts.rank.limit, _lasts(params, parts)))


def _lasts(params: Any, parts: Parts) -> list[int]:
    """Returns, rising, the largest ranks at which some leaf is still projected."""
    plans, _ = initial_projectors(params, parts._replace(rank=FixedRank(1)))
    views = [plan.view for plan in plans.values() if plan.view is not None]
    short_sides = {min(view.kept_size, view.projected_size) for view in views}
    return sorted(side - 1 for side in short_sides if side > 1) or [1]


def _state(
    params: Any, core: Core, projectors: Mapping[tuple, Projector], views: Views
) -> tuple[ScaleByLowRankState, Any]:
    """Returns the state, and zeros like the core's gradients."""

    def subspace(path, leaf):
        if path not in projectors:
            return optax.MaskedNode()
        return _subspace(projectors[path], leaf)

    def coordinates(path, leaf):
        if path not in projectors:
            return leaf
        return projectors[path].coordinates_beside(leaf)

    in_subspace = jax.tree_util.tree_map_with_path(coordinates, params, is_leaf=is_box)
    inner_state = core.init(params, in_subspace, projectors, views)
    subspaces = jax.tree_util.tree_map_with_path(subspace, params, is_leaf=is_box)
    state = ScaleByLowRankState(jnp.zeros([], jnp.int32), subspaces, inner_state)
    return on_mesh_of(params, state), in_subspace


def _subspace(projector: Projector, leaf: Any) -> Subspace:
    """Returns the subspace before the first gradient, sharded and boxed alike."""
    parts, view = projector.parts, projector.view

    def per_matrix(dtype):
        return zeros_beside(leaf, view.stack, dtype, stack_axes(view))

    def all_columns(dtype):
        return jax.tree.map(lambda x: x + projector.capacity, per_matrix(dtype))

    return Subspace(
        basis=() if parts.is_random else _blank_basis(projector, leaf),
        rank=all_columns(jnp.int32),
        demand=all_columns(jnp.float32),
        age=per_matrix(jnp.int32),
        refreshes=per_matrix(jnp.int32),
        failures=per_matrix(jnp.int32),
        trend=parts.refresh.init(per_matrix),
        residual=parts.residual.init(view, leaf),
    )


def _blank_basis(projector: Projector, leaf: Any) -> jax.Array:
    """Returns a basis of zero columns, or the numbers of no columns."""
    view = projector.view
    if not projector.parts.is_numbered:
        shape, axes = projector.basis_shape, basis_axes(view)
        return zeros_beside(leaf, shape, projector.dtype, axes)
    shape, axes = (*view.stack, 1, projector.capacity), (*stack_axes(view), (), ())
    zeros = zeros_beside(leaf, shape, jnp.int32, axes)
    return jax.tree.map(lambda x: x + blank(x.dtype), zeros)
