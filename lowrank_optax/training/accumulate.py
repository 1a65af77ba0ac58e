"""Gradient accumulation inside the subspace: no full gradient outlives its micro-batch.

Each micro-batch's gradient is projected at once and added in the subspace. With the
basis frozen the sum of projections is the projection of the sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

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

    def _replace(self, **functions: Callable) -> "Accumulation":
        """Returns it with another ``init`` or ``update``, and the same two halves."""
        replaced = super()._replace(**functions)
        replaced.halves = self.halves
        return replaced


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
    comes; it does not change inside a window. A matrix that has none yet, because its
    gradient is zero or not finite there, gets one from the first micro-batch that has a
    gradient. Transformations in front of the low-rank one, such as clipping by global
    norm, get the mean with projected leaves in their subspace: the norm that is clipped
    is that of the *projected* mean gradient, at most the full one for orthonormal
    bases, and equal to it in expectation (of squares) for random ones.

    In a compiled step that holds all k micro-batches, ``add`` in a scan and ``finish``
    after it spare the k - 1 updates by zeros.

    Args:
        optimizer: Any Optax transformation, low-rank ones anywhere inside.
        every_k: Micro-batches k of an update, >= 1.

    Returns:
        An :class:`Accumulation`. Its ``update`` needs ``params``, and takes
        ``weight``: the weight of the micro-batch, such as its number of tokens where
        gradients are means over tokens; 1.0 by default, for plain means.

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
        params = as_arrays(params)
        return on_mesh_of(params, first_window(inner, params))

    def add(grads, state, weight=1.0, params=None, refresh=True):
        grads = as_arrays(grads)
        weight = jnp.asarray(weight, jnp.float32)
        # Without shardings: those of an explicit mesh mean nothing inside.
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
                "accumulate needs params in update: gradients in the subspace do not "
                "say what shape they had."
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
    accumulation.halves = add, finish
    return accumulation
