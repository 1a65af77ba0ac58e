"""Gradient accumulation inside the subspace: no full gradient outlives its micro-batch.

Each micro-batch's gradient is projected at once, and added in the subspace. The basis
does not change meanwhile, so the sum of projections is the projection of the sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import as_count
from lowrank_optax.matrix.arrays import as_arrays, struct_of
from lowrank_optax.matrix.sharding import (
    on_mesh_of,
    with_automatic_axes,
    zeros_like_update,
)
from lowrank_optax.projected import full_size
from lowrank_optax.training.window import (
    AccumulateState,
    finished,
    first_window,
    with_gradients,
)


class Accumulation(optax.GradientTransformationExtraArgs):
    """The transformation of :func:`accumulate`, with its two halves.

    Attributes:
        init: params -> :class:`AccumulateState`.
        update: (gradients, state, params, weight=1.0) -> (updates, state).
        every_k: Micro-batches of an update.
    """

    every_k: int
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
            gradients: Gradients of the micro-batch, full or projected.
            state: State before the micro-batch.
            weight: Weight of the micro-batch. 0 leaves its gradients out, whatever they
                are: a mean over no tokens is not a number.
            params: Parameters, or their shapes; needed for projected gradients.
            refresh: False leaves the renewal of bases out of the program.
        """
        return self.halves[0](gradients, state, weight, params, refresh)

    def finish(
        self, state: AccumulateState, params: Any, **extra_args: Any
    ) -> tuple[Any, AccumulateState]:
        """Returns the updates for the mean gradient, and an empty window.

        Args:
            state: State after any number of :meth:`add`. Without any, the mean gradient
                is zero.
            params: Parameters. The updates have the shapes and dtypes of the
                parameters.
            extra_args: Extra arguments of the optimizer.
        """
        return self.halves[1](state, params, extra_args)

    def _replace(self, **functions: Callable) -> "Accumulation":
        """Returns a copy with another ``init`` or ``update``, and the same halves."""
        replaced = super()._replace(**functions)
        replaced.every_k, replaced.halves = self.every_k, self.halves
        return replaced


def accumulate(optimizer: optax.GradientTransformation, every_k: int) -> Accumulation:
    r"""Updates once in k micro-batches, by the mean of their gradients.

    Call ``update`` with the gradient of each micro-batch, as for ``optax.MultiSteps``.
    ``update`` returns zeros, except at each k-th call. Sums are stored in the subspaces
    of the low-rank transformations inside ``optimizer``. For a leaf with the basis P,
    micro-batch gradients G_i and weights w_i, the mean is

    .. math:: \frac{\sum_i w_i G_i P}{\sum_i w_i}

    This mean equals the projection of the mean gradient, up to rounding, and takes
    a c r numbers at granularity c instead of a b. Some leaves accumulate at full size:
    unprojected leaves, leaves of two low-rank transformations, and leaves of methods
    with full gradients (Fira, APOLLO, ``low_rank_muon``).

    A due basis is computed from the first micro-batch of a window, and does not change
    inside the window. A matrix may still lack a basis, after a zero or non-finite
    gradient. The next micro-batch with a usable gradient then gives its basis.

    A transformation in front of the low-rank one, such as clipping by the global norm,
    gets the *projected* mean gradient. For orthonormal bases the norm of the projected
    mean is at most the full norm. For random bases their squares are equal in
    expectation.

    A compiled step with all k micro-batches can call ``add`` in a scan, and ``finish``
    after the scan. This saves the k - 1 updates by zeros.

    Args:
        optimizer: Any Optax transformation, with low-rank ones anywhere inside.
        every_k: Number k of micro-batches per update, >= 1.

    Returns:
        An :class:`Accumulation`. Its ``update`` needs ``params``, and takes the
        micro-batch's ``weight``, 1.0 by default. Give the number of tokens where
        gradients are means over tokens. Extra arguments reach the optimizer from the
        call that ends a window.

    Raises:
        ValueError: If ``every_k`` is below 1.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = accumulate(lowrank_optax.galore(1e-2, rank=2), every_k=4)
        >>> jax.eval_shape(tx.init, params).sums["w"]
        ProjectedSum(coordinates=ShapeDtypeStruct(shape=(64, 2), dtype=float32))
    """
    every_k = as_count("every_k", every_k)
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        params = as_arrays(params)
        return on_mesh_of(params, first_window(inner, params))

    def add(grads, state, weight=1.0, params=None, refresh=True):
        grads = as_arrays(grads)
        weight = jnp.asarray(weight, jnp.float32)
        # Without shardings: those of an explicit mesh have no meaning inside.
        like = jax.tree.map(struct_of, full_size(grads, params))

        def added(grads, state):
            return with_gradients(inner, grads, state, weight, like, refresh)

        return with_automatic_axes(added, state, grads, state)

    def finish(state, params, extra_args):
        return finished(inner, state, as_arrays(params), extra_args)

    def update(updates, state, params=None, **extra_args):
        weight = extra_args.pop("weight", 1.0)
        if params is None:
            raise ValueError(
                "accumulate needs params in update, for the shapes of projected "
                "gradients: tx.update(gradients, state, params)."
            )
        params = as_arrays(params)
        refresh = extra_args.get("refresh", True)
        state = add(updates, state, weight, params, refresh)

        def of_window():
            return finish(state, params, extra_args)

        shapes = jax.eval_shape(of_window)[0]

        def unfinished():
            return jax.tree.map(zeros_like_update, params, shapes), state

        return jax.lax.cond(state.micro_step >= every_k, of_window, unfinished)

    accumulation = Accumulation(init, update)
    accumulation.every_k, accumulation.halves = every_k, (add, finish)
    return accumulation


def check_accumulates_outside(optimizer: Any, state: Any) -> None:
    """Raises ValueError if what an optimizer is made of accumulates.

    Args:
        optimizer: May be an :class:`Accumulation` itself.
        state: Its state.
    """

    def accumulates(node: Any) -> bool:
        return isinstance(node, AccumulateState)

    inside = state.inner_state if isinstance(optimizer, Accumulation) else state
    if any(map(accumulates, jax.tree.leaves(inside, is_leaf=accumulates))):
        raise ValueError(
            "accumulate stands inside the optimizer, and train_step adds up the micro-"
            "batches of an update by itself; leave accumulate out, and give train_step "
            "micro_batches."
        )
