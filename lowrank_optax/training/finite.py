"""``apply_if_finite``, as in optax, but for projected gradients too."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import check_at_least
from lowrank_optax.matrix.arrays import as_arrays
from lowrank_optax.matrix.sharding import zeros_like_update
from lowrank_optax.projected import full_size


def apply_if_finite(
    inner: optax.GradientTransformation, max_consecutive_errors: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Leaves out updates with non-finite gradients, projected gradients too.

    The state and the behaviour are those of ``optax.apply_if_finite``. For a non-finite
    gradient, optax's function returns zeros like the gradient; this function returns
    zeros like the parameter. A :class:`lowrank_optax.Projected` is not like its
    parameter, so optax's function cannot be compiled with a projected gradient.

    Args:
        inner: Any Optax transformation, with low-rank ones anywhere inside.
        max_consecutive_errors: Most updates left out in a row, >= 0. The next update is
            applied even if it is not finite, as in optax. None: no limit.

    Returns:
        A transformation with the state ``optax.ApplyIfFiniteState``.

    Raises:
        ValueError: If ``max_consecutive_errors`` is negative.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = apply_if_finite(lowrank_optax.galore(1e-2, rank=2))
        >>> grads = {"w": jnp.full((64, 16), jnp.nan)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> float(jnp.abs(updates["w"]).max()), int(state.total_notfinite)
        (0.0, 1)
    """
    if max_consecutive_errors is not None:
        check_at_least("max_consecutive_errors", max_consecutive_errors, 0)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        zero = jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(
            notfinite_count=zero,
            last_finite=jnp.asarray(True),
            total_notfinite=jnp.zeros_like(zero),
            inner_state=inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        updates, params = as_arrays(updates), as_arrays(params)
        leaves = jax.tree.leaves(updates)
        is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))
        in_a_row = jnp.where(is_finite, 0, optax.safe_increment(state.notfinite_count))
        applies = is_finite
        if max_consecutive_errors is not None:
            applies |= in_a_row > max_consecutive_errors

        def do_update():
            return inner.update(updates, state.inner_state, params, **extra_args)

        shapes = jax.eval_shape(do_update)[0]
        like = full_size(updates, params)

        def leave_out():
            zeros = jax.tree.map(zeros_like_update, like, shapes)
            return zeros, state.inner_state

        new_updates, inner_state = jax.lax.cond(applies, do_update, leave_out)
        total = optax.safe_increment(state.total_notfinite)
        return new_updates, optax.ApplyIfFiniteState(
            notfinite_count=in_a_row,
            last_finite=is_finite,
            total_notfinite=jnp.where(is_finite, state.total_notfinite, total),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
