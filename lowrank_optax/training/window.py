"""A window of micro-batches: its beginning, additions to it, and its end."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.optimizer import Binding, bind
from lowrank_optax.binding.states import all_slots, low_rank_states, slots_of
from lowrank_optax.matrix.arrays import leaf_name, wide
from lowrank_optax.matrix.boxes import boxed_like, contents, is_box, unboxed
from lowrank_optax.matrix.sharding import zeros_like_update
from lowrank_optax.projected import (
    Projected,
    ProjectedSum,
    explained,
    is_projected,
)
from lowrank_optax.renewal import renewed_everywhere
from lowrank_optax.subspace import Projector

_WAYS = (
    "Replace optax.apply_if_finite by lowrank_optax.apply_if_finite. Put any other "
    "transformation that needs gradients like the parameters behind the low-rank one "
    'or around accumulate; or give train_step gradients="full".'
)


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
        micro_step: Micro-batches in the current window; (), int32.
        weight: Sum of the weights of these micro-batches; (), float32.
        sums: Weighted sums of the gradients, a tree like the parameters. A projected
            leaf has a ``ProjectedSum``, (*stack, a*c, r), another leaf an array of the
            leaf's shape; float32, or wider for wider leaves.
        inner_state: State of the optimizer.
    """

    micro_step: jax.Array
    weight: jax.Array
    sums: Any
    inner_state: Any


def first_window(
    optimizer: optax.GradientTransformationExtraArgs, params: Any
) -> AccumulateState:
    """Returns an empty window with the first state of the optimizer.

    Raises:
        TypeError: If a leaf has a dtype without sums, such as a typed key.
    """
    inner_state = optimizer.init(params)
    projectors = _early(bind(optimizer, params), params, inner_state)

    def zeros(path, leaf):
        if path in projectors:
            return ProjectedSum(projectors[path].coordinates_beside(leaf))
        array = contents(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{leaf_name(path)} has dtype {array.dtype}, and gradients "
                "of this dtype cannot be added up; leave it out of the parameters."
            )
        return zeros_like_update(leaf, jax.ShapeDtypeStruct((), wide(array.dtype)))

    return AccumulateState(
        micro_step=jnp.zeros([], jnp.int32),
        weight=jnp.zeros([], jnp.float32),
        sums=jax.tree_util.tree_map_with_path(zeros, params, is_leaf=is_box),
        inner_state=inner_state,
    )


def with_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: Any,
    state: AccumulateState,
    weight: jax.Array,
    like: Any,
    refresh: bool,
) -> AccumulateState:
    """Returns the window with the gradients of one micro-batch added.

    Args:
        optimizer: The accumulating optimizer.
        gradients: Gradients of the micro-batch, full or projected.
        state: The window before the micro-batch.
        weight: Weight of the micro-batch; (), float32. 0 leaves its gradients out.
        like: Tree of the gradients' full shapes.
        refresh: Whether to renew due bases.
    """
    is_first = state.micro_step == 0
    binding = bind(optimizer, like)
    inner_state = state.inner_state
    if refresh:
        inner_state = renewed_everywhere(
            gradients,
            inner_state,
            like,
            binding,
            kept=lambda parts: parts.uses_residual,
            again=~is_first,
        )
    projectors = _early(binding, like, inner_state)
    subspaces = all_slots(inner_state)

    def add_leaf(path, gradient: Any, total):
        if path in projectors and not is_projected(gradient):
            projector = projectors[path]
            basis = projector.basis(subspaces[path])
            gradient = Projected(projector.view.project(gradient, basis))
        if is_projected(gradient):
            gradient = ProjectedSum(gradient.coordinates)
        elif gradient.dtype == jax.dtypes.float0:
            raise TypeError(
                f"{leaf_name(path)} has a gradient of dtype float0, which "
                "cannot be added up; leave frozen leaves out of the gradients, and out "
                "of the optimizer by optax.masked."
            )
        shapes = [jax.tree.map(jnp.shape, x) for x in (gradient, total)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{leaf_name(path)}: a gradient of shape {shapes[0]} "
                f"does not fit a sum of shape {shapes[1]}; was the state made for "
                "other parameters?"
            )
        return jax.tree.map(_sum, total, gradient)

    def _sum(total, gradient):
        # A new window forgets the old sum, whatever its values.
        start = jnp.where(is_first, 0, total)
        return start + weighted(gradient.astype(total.dtype), weight)

    sums = jax.tree_util.tree_map_with_path(
        add_leaf, unboxed(gradients), unboxed(state.sums), is_leaf=is_projected
    )
    return AccumulateState(
        micro_step=state.micro_step + 1,
        weight=jnp.where(is_first, 0, state.weight) + weight,
        sums=boxed_like(sums, state.sums),
        inner_state=inner_state,
    )


def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns an array times its weight: zero at weight 0, whatever the array has.

    A mean over no tokens is not a number.
    """
    return jnp.where(weight == 0, 0, x * weight.astype(x.dtype))


def finished(
    optimizer: optax.GradientTransformationExtraArgs,
    state: AccumulateState,
    params: Any,
    extra_args: Mapping[str, Any],
) -> tuple[Any, AccumulateState]:
    """Returns the optimizer's updates for the mean of a window, and an empty window.

    The optimizer's state keeps its dtypes, even for integer leaves.

    Raises:
        TypeError: If a transformation in the optimizer does not take projected means.
    """
    weight = jnp.where(state.weight > 0, state.weight, 1)

    def quotient(total):
        # Without a micro-batch the sums are those of the last window.
        sums = jnp.where(state.micro_step > 0, total, 0)
        return sums / weight.astype(total.dtype)

    def mean(total, leaf):
        if isinstance(total, ProjectedSum):
            return Projected(quotient(total.coordinates))
        return quotient(total).astype(leaf.dtype)

    means = jax.tree.map(
        mean,
        unboxed(state.sums),
        unboxed(params),
        is_leaf=lambda x: isinstance(x, ProjectedSum),
    )
    means = boxed_like(means, params)
    with explained(means, "accumulate", _WAYS):
        updates, inner_state = optimizer.update(
            means, state.inner_state, params, **extra_args
        )
    inner_state = like_before(inner_state, state.inner_state)
    return updates, AccumulateState(
        micro_step=jnp.zeros_like(state.micro_step),
        weight=jnp.zeros_like(state.weight),
        sums=state.sums,
        inner_state=inner_state,
    )


def like_before(state: Any, old: Any) -> Any:
    """Returns an optimizer's state with the arrays and the dtypes that it had.

    ``optax.zero_nans`` makes its state out of the gradients, and so a ``Projected`` in
    the place of an array. A state that had another structure, as ``optax.monitor`` has
    before its first update, stays as it is.
    """
    trees = [jax.tree.structure(x, is_leaf=is_projected) for x in (state, old)]
    if trees[0] != trees[1]:
        return state

    def like(new, old):
        if is_projected(new) and not is_projected(old):
            new = new.coordinates
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    return jax.tree.map(like, state, old, is_leaf=is_projected)


def _early(binding: Binding, params: Any, state: Any) -> dict[tuple, Projector]:
    """Returns the projectors of the leaves whose gradients are added projected."""
    return {
        path: projector
        for node in low_rank_states(state)
        if slots_of(node)
        for path, projector in binding.projectors(params, node).items()
        if not projector.parts.uses_residual and path not in binding.shared
    }
