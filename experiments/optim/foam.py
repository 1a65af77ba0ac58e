"""FOAM: Adam whose moments are those of averages of neighbouring entries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScaleByFoamState(NamedTuple):
    """State of :func:`scale_by_foam`.

    Attributes:
        mu, nu: Moments of the folded gradients, (..., m / 2^l), float32.
    """

    mu: Any
    nu: Any


def scale_by_foam(
    level: int = 2, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Adam whose moments are those of averages of neighbouring entries.

    A kernel's gradient G (n, m) is folded: each 2^l neighbours along the m outputs
    become their mean. Unfolded, each mean stands 2^l times.

    .. math::
        \tilde G = \mathrm{fold}(G), \quad
        \tilde M_t = \beta_1 \tilde M_{t-1} + (1 - \beta_1) \tilde G, \quad
        \tilde V_t = \beta_2 \tilde V_{t-1} + (1 - \beta_2) \tilde G^2

        E = G - \mathrm{unfold}(\tilde G), \quad
        U = \frac{\mathrm{unfold}(\tilde M_t) + E}
                 {\sqrt{\mathrm{unfold}(\tilde V_t) + E^2} + \epsilon}

    As in the paper, no bias is corrected. A side that 2^l does not divide is folded
    less, by the largest power of two that does.

    Args:
        level: l, 0 or more; the moments take 1 / 2^l of Adam's.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.

    References:
        Wen et al., `FOAM <https://arxiv.org/abs/2512.07112>`_, 2025.
    """

    def of_fold(x):
        m = x.shape[-1]
        # The largest power of two that divides m is m & -m.
        fold = min(2**level, m & -m)
        return (*x.shape[:-1], m // fold, fold)

    def init(params):
        def zeros():
            return jax.tree.map(
                lambda x: jnp.zeros(of_fold(x)[:-1], jnp.float32), params
            )

        return ScaleByFoamState(zeros(), zeros())

    def update(updates, state, params=None):
        del params

        def of_leaf(g, mu, nu):
            blocks = g.astype(jnp.float32).reshape(of_fold(g))
            mean = jnp.mean(blocks, axis=-1)
            rest = blocks - mean[..., None]
            mu = b1 * mu + (1 - b1) * mean
            nu = b2 * nu + (1 - b2) * mean**2
            root = jnp.sqrt(nu[..., None] + rest**2)
            scaled = (mu[..., None] + rest) / (root + eps)
            return scaled.reshape(g.shape).astype(g.dtype), mu, nu

        leaves, treedef = jax.tree.flatten(updates)
        before = [treedef.flatten_up_to(x) for x in state]
        after = [of_leaf(*each) for each in zip(leaves, *before, strict=True)]
        new, *moments = (treedef.unflatten(x) for x in zip(*after, strict=True))
        return new, ScaleByFoamState(*moments)

    return optax.GradientTransformation(init, update)
