"""Gradient accumulation inside the subspace: no full gradient outlives its micro-batch.

Each micro-batch's gradient is projected at once and added in the subspace. With the
basis frozen the sum of projections is the projection of the sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.optimizer import Binding, bind
from lowrank_optax.binding.states import low_rank_states, slots_of
from lowrank_optax.matrix.boxes import (
    boxed_like,
    contents,
    is_box,
    unboxed,
)
from lowrank_optax.matrix.sharding import (
    on_mesh_of,
    with_automatic_axes,
    zeros_like_update,
)
from lowrank_optax.projected import (
    Projected,
    ProjectedSum,
    full_size,
    is_projected,
)
from lowrank_optax.renewal import renewed_everywhere
from lowrank_optax.subspace import Projector


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
        micro_step: Micro-batches added in the window under way; (), int32.
        weight: Sum of their weights; (), float32.
        sums: Weighted sums of their gradients, a tree like the parameters:
            :class:`ProjectedSum`, (*stack, a*c, r), for projected leaves,
            the leaf's shape for others; float32, or wider for wider leaves.
        inner_state: State of the optimizer.
    """

    micro_step: jax.Array
    weight: jax.Array
    sums: Any
    inner_state: Any


class Accumulation(optax.GradientTransformationExtraArgs):
    """What :func:`accumulate` returns: a transformation, and the two halves of it.

    Attributes:
        init: params -> :class:`AccumulateState`.
        update: (gradients, state, params, weight=1.0) -> (updates, state).
    """

    halves: tuple[Callable, Callable]

    def add(
        self,
        gradients: Any,
        state: AccumulateState,
        weight: Any = 1.0,
        params: Any = None,
        refresh: bool = True,
    ) -> AccumulateState:
        """Returns the state with the gradient of one micro-batch added.

        Args:
            gradients: Of the micro-batch; projected leaves in their subspace or not.
            state: Before.
            weight: Of the micro-batch.
            params: Parameters, or their shapes; needed where leaves are in their
                subspace.
            refresh: False leaves the renewal of bases out of the program.
        """
        return self.halves[0](gradients, state, weight, params, refresh)

    def finish(
        self, state: AccumulateState, params: Any, **extra_args: Any
    ) -> tuple[Any, AccumulateState]:
        """Returns the updates by the mean of what was added, and an empty window.

        Args:
            state: After any number of :meth:`add`; without one, gradients count as 0.
            params: Parameters; the updates have their shapes and dtypes.
            extra_args: For the optimizer.
        """
        return self.halves[1](state, params, extra_args)


def accumulate(optimizer: optax.GradientTransformation, every_k: int) -> Accumulation:
    r"""Updates once in k micro-batches, by the mean of their gradients.

    As ``optax.MultiSteps``: ``update`` is called with the gradient of one micro-batch
    after the other and returns zeros but for each k-th time. What lies between is
    stored in the subspaces of the low-rank transformations inside ``optimizer``: for a
    leaf with the basis P, micro-batch gradients G_i and weights w_i

    .. math:: \frac{\sum_i w_i G_i P}{\sum_i w_i}

    which is a c r numbers instead of a b at granularity c, and equals the projection of
    the mean to rounding. Leaves that are not projected, and optimizers without a
    low-rank transformation, accumulate at full size; so do leaves that a second
    low-rank transformation is given too.

    Methods that look at full gradients (Fira, APOLLO, Muon with its momentum in a
    subspace) accumulate those.

    A basis that is due is computed from the first micro-batch of a window, as it
    comes; it does not change inside a window. Transformations in front of the low-rank
    one, such as clipping by global norm, get the mean with projected leaves in their
    subspace: the norm that is clipped is that of the *projected* mean gradient, at most
    the full one for orthonormal bases, and equal to it in expectation (of squares) for
    random ones.

    In a compiled step that holds all k micro-batches, ``add`` in a scan and ``finish``
    after it spare the k - 1 updates by zeros.

    Args:
        optimizer: Any Optax transformation, low-rank ones anywhere inside.
        every_k: Micro-batches k of an update, >= 1.

    Returns:
        An :class:`Accumulation`. Its ``update`` needs ``params``, and takes ``weight``:
        the weight of the micro-batch, such as its number of tokens where gradients are
        means over tokens; 1.0 by default, for plain means.

    Raises:
        ValueError: If ``every_k`` is below 1.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = accumulate(lowrank_optax.galore(1e-2, rank=2), every_k=4)
        >>> jax.eval_shape(tx.init, params).sums["w"]
        ProjectedSum(coordinates=ShapeDtypeStruct(shape=(64, 2), dtype=float32))
    """
    is_int = isinstance(every_k, int) and not isinstance(every_k, bool)
    if not is_int or every_k < 1:
        raise ValueError(f"every_k must be an int >= 1, got {every_k!r}.")
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        inner_state = inner.init(params)
        projectors = _early(bind(inner, params), params, inner_state)

        def zeros(path, leaf):
            if path in projectors:
                return ProjectedSum(projectors[path].coordinates_beside(leaf))
            dtype = jnp.promote_types(contents(leaf).dtype, jnp.float32)
            return zeros_like_update(leaf, jax.ShapeDtypeStruct((), dtype))

        state = AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            sums=jax.tree_util.tree_map_with_path(zeros, params, is_leaf=is_box),
            inner_state=inner_state,
        )
        return on_mesh_of(params, state)

    def add(grads, state, weight=1.0, params=None, refresh=True):
        weight = jnp.asarray(weight, jnp.float32)
        # Without shardings: those of an explicit mesh mean nothing inside.
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), full_size(grads, params)
        )

        def added(grads, state):
            return _add(inner, grads, state, weight, like, refresh)

        return with_automatic_axes(added, state, grads, state)

    def finish(state, params, extra_args):
        return _finish(inner, state, params, extra_args)

    def update(updates, state, params=None, **extra_args):
        weight = extra_args.pop("weight", 1.0)
        if params is None:
            raise ValueError(
                "accumulate needs params in update: gradients in the subspace do not "
                "say what shape they had."
            )
        refresh = extra_args.get("refresh", True)
        state = add(updates, state, weight, params, refresh)

        def finished():
            return _finish(inner, state, params, extra_args)

        shapes = jax.eval_shape(finished)[0]

        def unfinished():
            return jax.tree.map(zeros_like_update, params, shapes), state

        return jax.lax.cond(state.micro_step >= every_k, finished, unfinished)

    accumulation = Accumulation(init, update)
    accumulation.halves = add, finish
    return accumulation


def _early(binding: Binding, params: Any, state: Any) -> dict[tuple, Projector]:
    """Returns the projectors of the leaves that are projected before they are added."""
    return {
        path: projector
        for node in low_rank_states(state)
        if slots_of(node)
        for path, projector in binding.projectors(params, node).items()
        if not projector.parts.needs_full_gradients and path not in binding.shared
    }


def _add(
    inner, grads, state: AccumulateState, weight, like, refresh: bool
) -> AccumulateState:
    is_first = state.micro_step == 0
    binding = bind(inner, like)
    inner_state = state.inner_state
    if refresh:
        inner_state = renewed_everywhere(
            grads,
            inner_state,
            like,
            binding,
            allowed=is_first,
            kept=lambda parts: parts.needs_full_gradients,
        )
    projectors = _early(binding, like, inner_state)
    subspaces = {
        path: slot
        for node in low_rank_states(inner_state)
        for path, slot in slots_of(node).items()
    }

    def add_leaf(path, gradient, total):
        if path in projectors and not is_projected(gradient):
            projector = projectors[path]
            basis = projector.basis(subspaces[path])
            gradient = Projected(projector.view.project(gradient, basis))
        if is_projected(gradient):
            gradient = ProjectedSum(gradient.coordinates)
        shapes = [jax.tree.map(jnp.shape, x) for x in (gradient, total)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: a gradient of shape {shapes[0]} "
                f"does not fit a sum of shape {shapes[1]}; was the state made for "
                "other parameters?"
            )
        return jax.tree.map(_sum, total, gradient)

    def _sum(total, gradient):
        # A new window forgets the sum, whatever is in it.
        start = jnp.where(is_first, 0, total)
        return start + weight.astype(total.dtype) * gradient.astype(total.dtype)

    sums = jax.tree_util.tree_map_with_path(
        add_leaf, unboxed(grads), unboxed(state.sums), is_leaf=is_projected
    )
    return AccumulateState(
        micro_step=state.micro_step + 1,
        weight=jnp.where(is_first, 0, state.weight) + weight,
        sums=boxed_like(sums, state.sums),
        inner_state=inner_state,
    )


def _finish(inner, state: AccumulateState, params, extra_args):
    weight = jnp.where(state.weight > 0, state.weight, 1)

    def mean(total, leaf):
        if isinstance(total, ProjectedSum):
            sums = total.coordinates
            return Projected(sums / weight.astype(sums.dtype))
        return (total / weight.astype(total.dtype)).astype(leaf.dtype)

    means = jax.tree.map(
        mean,
        unboxed(state.sums),
        unboxed(params),
        is_leaf=lambda x: isinstance(x, ProjectedSum),
    )
    means = boxed_like(means, params)
    updates, inner_state = inner.update(means, state.inner_state, params, **extra_args)
    return updates, AccumulateState(
        micro_step=jnp.zeros_like(state.micro_step),
        weight=jnp.zeros_like(state.weight),
        sums=state.sums,
        inner_state=inner_state,
    )
