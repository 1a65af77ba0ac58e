"""Stable-SPAM: Adam behind clipped spikes and steadied norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Decays of the tracked norm, its square, and the tracked largest entry.
_NORM, _SQUARE, _PEAK = 0.7, 0.9, 0.999


class ScaleByStableSpamState(NamedTuple):
    """State of :func:`scale_by_stable_spam`, for each leaf a stack of matrices.

    Attributes:
        count: Updates done; (), int32.
        mu, nu: Adam's moments.
        norm, square, peak: Averages of a matrix's norm, of its square and of its
            largest entry, (*stack, 1, 1).
    """

    count: jax.Array
    mu: Any
    nu: Any
    norm: Any
    square: Any
    peak: Any


def scale_by_stable_spam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, reset_every: int = 500
) -> optax.GradientTransformation:
    r"""Adam behind clipped spikes and steadied norms, its moments reset now and then.

    For each matrix G, with bias-corrected averages T of its largest entry (decay
    0.999), and n and s of its norm and of the norm's square (0.7 and 0.9):

    .. math::
        G'_{ij} = G_{ij} \frac{T}{\max |G|} \text{ where } |G_{ij}| > T, \quad
        G'' = \frac{G'}{\|G'\|_F} \frac{n}{\sqrt{s} + \epsilon}

    G'' enters Adam, whose moments are zero again every ``reset_every`` updates. Where
    the paper is silent: the norm is that of the clipped matrix; Adam's bias correction
    begins anew with each reset; no warm-up of the rate follows a reset.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment, and to that of the norm's square.
        reset_every: Updates between two resets of the moments; at least 1.

    References:
        Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025.
    """

    def init(params):
        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

        def of_matrices():
            return jax.tree.map(
                lambda x: jnp.zeros((*x.shape[:-2], 1, 1), jnp.float32), params
            )

        count = jnp.zeros([], jnp.int32)
        rows = (of_matrices() for _ in range(3))
        return ScaleByStableSpamState(count, zeros(), zeros(), *rows)

    def update(updates, state, params=None):
        del params
        total = jnp.asarray(optax.safe_increment(state.count))
        # Of Adam, since the last reset.
        age = state.count % reset_every + 1
        kept = age > 1

        def of_leaf(g, mu, nu, norm, square, peak):
            dtype = g.dtype
            g = g.astype(jnp.float32)
            largest = jnp.max(jnp.abs(g), axis=(-1, -2), keepdims=True)
            peak = _mean(peak, largest, _PEAK)
            most = peak / (1 - _PEAK**total)
            clipped = g * most / jnp.where(largest > 0, largest, 1)
            g = jnp.where(jnp.abs(g) > most, clipped, g)
            size = jnp.sqrt(jnp.sum(g**2, axis=(-1, -2), keepdims=True))
            norm = _mean(norm, size, _NORM)
            square = _mean(square, size**2, _SQUARE)
            root = jnp.sqrt(square / (1 - _SQUARE**total))
            steady = norm / (1 - _NORM**total) / (root + eps)
            g = g / jnp.where(size > 0, size, 1) * steady
            mu = _mean(jnp.where(kept, mu, 0), g, b1)
            nu = _mean(jnp.where(kept, nu, 0), g**2, b2)
            scaled = mu / (1 - b1**age) / (jnp.sqrt(nu / (1 - b2**age)) + eps)
            return scaled.astype(dtype), mu, nu, norm, square, peak

        leaves, treedef = jax.tree.flatten(updates)
        before = [treedef.flatten_up_to(x) for x in state[1:]]
        after = [of_leaf(*each) for each in zip(leaves, *before, strict=True)]
        new, *trees = (treedef.unflatten(x) for x in zip(*after, strict=True))
        return new, ScaleByStableSpamState(total, *trees)

    return optax.GradientTransformation(init, update)


def _mean(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    return decay * old + (1 - decay) * new
