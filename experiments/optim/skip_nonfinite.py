"""Leaves out an update whose gradient is not finite, full-size or projected."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SkipNonFiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
        notfinite_count: Updates left out in a row, up to now; (), int32.
        total_notfinite: Updates left out in all; (), int32.
        inner_state: State of the inner transformation.
    """

    notfinite_count: jax.Array
    total_notfinite: jax.Array
    inner_state: Any


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner``, but zero updates and the old state for non-finite gradients.

    ``optax.apply_if_finite`` never giving in, for gradients that are projected too:
    optax's zeros have the shapes of what comes in, these of what goes out.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        zero = jnp.zeros([], jnp.int32)
        return SkipNonFiniteState(zero, jnp.zeros_like(zero), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        leaves = jax.tree.leaves(updates)
        is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))

        def do_update():
            return inner.update(updates, state.inner_state, params, **extra_args)

        shapes = jax.eval_shape(do_update)[0]

        def skip():
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return zeros, state.inner_state

        new_updates, inner_state = jax.lax.cond(is_finite, do_update, skip)
        skipped = jnp.where(is_finite, 0, 1).astype(jnp.int32)
        return new_updates, SkipNonFiniteState(
            notfinite_count=jnp.where(is_finite, 0, state.notfinite_count + 1),
            total_notfinite=state.total_notfinite + skipped,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
