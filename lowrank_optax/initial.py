"""The state before the first gradient, and the rank that a budget comes to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.moments import locate_moments
from lowrank_optax.binding.optimizer import announce, unheard
from lowrank_optax.codes import bytes_of
from lowrank_optax.core import Core
from lowrank_optax.matrix.plan import as_arrays
from lowrank_optax.parts import Parts
from lowrank_optax.rules.budget import Budget, Size, as_stored, largest_fitting
from lowrank_optax.rules.ranks import FixedRank
from lowrank_optax.subspace import (
    Projector,
    ScaleByLowRankState,
    initial_projectors,
)


def initial_state(params: Any, core: Core, parts: Parts) -> ScaleByLowRankState:
    """Returns the state of a transformation for parameters, or their shapes."""
    params = as_arrays(params)
    parts = _with_rank_of_budget(params, core, parts)
    plans, projectors = initial_projectors(params, parts)
    announce(plans, parts)
    state, in_subspace = _state(params, core, projectors)
    shapes = {path: projector.shape for path, projector in projectors.items()}
    others = plans.keys() - shapes.keys()
    locate_moments(state.inner_state, shapes, others, parts.moments)
    core.check(in_subspace, state.inner_state)
    return state


def _with_rank_of_budget(params: Any, core: Core, parts: Parts) -> Parts:
    """Returns the parts with the rank that a budget of bytes comes to."""
    if not isinstance(parts.rank, Budget):
        return parts

    def of_rank(rank: int) -> Parts:
        return parts._replace(rank=FixedRank(rank))

    def size_at(rank: int) -> Size:
        def init(params):
            _, projectors = initial_projectors(params, of_rank(rank))
            return _state(params, core, projectors)[0]

        with unheard():
            state = as_stored(jax.eval_shape(init, params), params)
        return Size(bytes_of(state), jax.tree.structure(state))

    return of_rank(largest_fitting(size_at, parts.rank.limit, _lasts(params, parts)))


def _lasts(params: Any, parts: Parts) -> list[int]:
    """Returns the ranks at which some leaf is projected for the last time, rising."""
    plans, _ = initial_projectors(params, parts._replace(rank=FixedRank(1)))
    views = [plan.view for plan in plans.values() if plan.view is not None]
    short_sides = {min(view.kept_size, view.projected_size) for view in views}
    return sorted(side - 1 for side in short_sides if side > 1) or [1]


def _state(
    params: Any, core: Core, projectors: Mapping[tuple, Projector]
) -> tuple[ScaleByLowRankState, Any]:
    """Returns the state, and zeros like the gradients that the core gets."""

    def subspace(path, leaf):
        if path not in projectors:
            return optax.MaskedNode()
        return projectors[path].initial(leaf)

    def coordinates(path, leaf):
        if path not in projectors:
            return leaf
        return projectors[path].coordinates_beside(leaf)

    in_subspace = jax.tree_util.tree_map_with_path(coordinates, params)
    inner_state = core.init(params, in_subspace, projectors)
    subspaces = jax.tree_util.tree_map_with_path(subspace, params)
    count = jnp.zeros([], jnp.int32)
    return ScaleByLowRankState(count, subspaces, inner_state), in_subspace
