"""Moments moved from the old basis into the new one: a rule per moment.

The transfer is R = P_old^T P_new (r, r). Moments M and V are (a, r), with their columns
in the subspace, so the paper's R M is M R here. Random bases are not orthonormal; their
transfer is :func:`random_transfer`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lowrank_optax.rules.lapack import one_by_one
from lowrank_optax.rules.orthonormal import HIGHEST

# (second moment V, first moment M or zeros, transfer R, updates done) -> new V
SecondMomentRule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# (first moment M, transfer R) -> new M
FirstMomentRule = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class RebaseRule:
    """A rule for the moments at a change of basis.

    Attributes:
        first: (M, R) -> M in the new basis, for moments linear in the gradients.
        second: (V, M, R, count) -> V in the new basis, for averages of squares. M is
            the first moment in the old basis (zeros, if the inner transformation has no
            first moment); count is the number of updates done.
    """

    first: FirstMomentRule
    second: SecondMomentRule


def transfer(old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns R = P_old^T P_new, (*stack, r_old, r_new)."""
    return jnp.einsum("...br,...bs->...rs", old, new, precision=HIGHEST)


def random_transfer(old: jax.Array, new: jax.Array) -> jax.Array:
    r"""Returns R = (P_old^T P_old)^-1 P_old^T P_new, (*stack, r_old, r_new).

    For bases that are not orthonormal. M (P_old^T P_old)^-1 P_old^T is the smallest
    gradient with the projection M, and M R is this gradient's projection by P_new.
    Columns of a small basis may coincide, so 1e-6 of its mean is added to the diagonal.
    """
    products = jnp.einsum("...br,...bs->...rs", old, old, precision=HIGHEST)
    mean = jnp.trace(products, axis1=-2, axis2=-1) / products.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(products.shape[-1], dtype=old.dtype), products.shape)
    ridge = 1e-6 * mean[..., None, None] * eye
    return one_by_one(jnp.linalg.solve, products + ridge, transfer(old, new))


def _exact(moment: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.einsum("...ar,...rs->...as", moment, r, precision=HIGHEST)


def _kept(moment: jax.Array, r: jax.Array) -> jax.Array:
    del r
    return moment


def _zeros(moment: jax.Array, r: jax.Array) -> jax.Array:
    del r
    return jnp.zeros_like(moment)


def _row_means(nu: jax.Array, r: jax.Array) -> jax.Array:
    """Returns the mean of each row over the columns in use, (*stack, a, 1)."""
    in_use = jnp.sum(jnp.any(r != 0, axis=-1), axis=-1)[..., None, None]
    return jnp.sum(nu, axis=-1, keepdims=True) / jnp.maximum(in_use, 1)


def _filled(nu: jax.Array, r: jax.Array) -> jax.Array:
    squares = r**2
    missing = 1 - jnp.sum(squares, axis=-2, keepdims=True)
    return _exact(nu, squares) + jnp.maximum(missing, 0) * _row_means(nu, r)


def ldadam_rebase(
    *, b1: jax.typing.ArrayLike = 0.9, b2: jax.typing.ArrayLike = 0.999
) -> RebaseRule:
    r"""LDAdam's rule, which moves the variance and the mean separately.

    After t updates, with the bias-corrected moments
    :math:`\hat M = M / (1 - b_1^t)` and :math:`\hat V = V / (1 - b_2^t)`,

    .. math::
        V' = (1 - b_2^t) \, | (\hat V - \hat M^2) (R \circ R) + (\hat M R)^2 |

    Args:
        b1: Decay of the first moment of the inner Adam; in [0, 1).
        b2: Decay of the second moment of the inner Adam; in [0, 1).

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
    """
    # Not a closure: `bind` finds the numbers of a partial.
    return RebaseRule(_exact, functools.partial(_ldadam_second, b1, b2))


def _ldadam_second(b1, b2, nu, mu, r, count):
    # count is 0 only before the first basis, and the moments are zero then.
    t = jnp.maximum(count, 1)
    correction = 1 - jnp.asarray(b2, nu.dtype) ** t
    mean = mu / (1 - jnp.asarray(b1, nu.dtype) ** t)
    variance = _exact(nu / correction - mean**2, r**2)
    return correction * jnp.abs(variance + _exact(mean, r) ** 2)


REBASE_RULES: dict[str, RebaseRule] = {
    "filled": RebaseRule(_exact, lambda nu, mu, r, count: _filled(nu, r)),
    "square": RebaseRule(_exact, lambda nu, mu, r, count: _exact(nu, r**2)),
    "abs": RebaseRule(_exact, lambda nu, mu, r, count: jnp.abs(_exact(nu, r))),
    "ldadam": ldadam_rebase(),
    "clamp": RebaseRule(_exact, lambda nu, mu, r, count: jnp.maximum(_exact(nu, r), 0)),
    "first": RebaseRule(_exact, lambda nu, mu, r, count: nu),
    "keep": RebaseRule(_kept, lambda nu, mu, r, count: nu),
    "zero": RebaseRule(
        _zeros, lambda nu, mu, r, count: jnp.broadcast_to(_row_means(nu, r), nu.shape)
    ),
}
"""The named rules. The first moment becomes M R exactly, except for "keep" and "zero".

========  ==========================================================================
name      second moment
========  ==========================================================================
filled    V (R o R) + (1 - colsums(R o R)) rowmeans(V): the part of a new column outside
          the old subspace gets the mean of its row
square    V (R o R): exact for uncorrelated coordinates, with gradients taken as zero
          outside the old subspace; the default
abs       abs(V R): depends on the arbitrary signs of the basis's columns
ldadam    see :func:`ldadam_rebase`, with b1 = 0.9, b2 = 0.999
clamp     max(V R, 0): the paper's rule, clamped at zero; some columns get too little
first     V: the expectation for random bases; the default of VLoRP and ProjFactor
keep      V, and M stays too: GaLore
zero      rowmeans(V), and M = 0: the optimizer starts again in the new subspace; V is
          not zero, because Adam's counter runs on and would not correct a zero
========  ==========================================================================

A rule never makes a second moment negative. A second moment that is too small makes
updates too large for about 1 / (1 - b2) updates. The table has the norm of Adam's
updates after a refresh, divided by the norm before it. The gradients are stationary
noise, and a new subspace shares little with the old one (rank 32 of 128, b2 = 0.999,
200 updates between two refreshes):

========  ==============  ====  ==================
name      at the refresh  most  100 updates later
========  ==============  ====  ==================
filled    0.72            1.01  1.00
square    1.44            1.81  1.38
abs       2.30            2.30  1.38
ldadam    1.42            1.81  1.38
clamp     1022            1022  1.53
first     0.72            1.02  1.00
keep      1.07            1.07  1.00
zero      0.56            1.01  1.00
========  ==============  ====  ==================

In training "square" still ended 0.5 % below "filled" in loss, at learning rates tuned
for "square" (``docs/results.md``). Therefore "square" is the default.
"""


def as_rebase_rule(rule: "str | RebaseRule") -> RebaseRule:
    """Returns a rule from its name, or the rule itself.

    Raises:
        ValueError: If no rule has this name.
    """
    if isinstance(rule, RebaseRule):
        return rule
    if rule not in REBASE_RULES:
        raise ValueError(f"rebase must be one of {sorted(REBASE_RULES)}, got {rule!r}.")
    return REBASE_RULES[rule]


def rebased(
    moments: Sequence[jax.Array],
    kinds: Sequence[str],
    r: jax.Array,
    count: jax.Array,
    rule: RebaseRule,
) -> list[jax.Array]:
    """Returns the moments of one leaf in the new basis, in their own dtypes.

    Args:
        moments: (*stack, a, r_old) each.
        kinds: "first" or "second" each.
        r: Transfer R; (*stack, r_old, r_new).
        count: Updates done.
        rule: The re-basing rule.
    """
    wide = [moment.astype(r.dtype) for moment in moments]
    firsts = [x for x, kind in zip(wide, kinds, strict=True) if kind == "first"]

    def follow(moment, kind):
        if kind == "first":
            return rule.first(moment, r)
        mean = firsts[0] if firsts else jnp.zeros_like(moment)
        return rule.second(moment, mean, r, count)

    return [
        follow(x, kind).astype(moment.dtype)
        for x, kind, moment in zip(wide, kinds, moments, strict=True)
    ]
