"""Moments of the old basis, expressed in the new one: a rule per moment.

With the transfer R = P_old^T P_new (r, r), moments M, V (a, r) have their columns in
the subspace, so R M of the paper is M R here. Random bases are not orthonormal: theirs
is :func:`random_transfer`.
"""

import dataclasses
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
    """How the two kinds of moments follow a change of basis.

    Attributes:
        first: (M, R) -> M in the new basis; anything linear in the gradients.
        second: (V, M, R, count) -> V in the new basis; anything that averages squares.
            M is the first moment before the change (zeros, where the inner
            transformation has none), count the updates done.
    """

    first: FirstMomentRule
    second: SecondMomentRule


def transfer(old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns R = P_old^T P_new, (*stack, r_old, r_new)."""
    return jnp.einsum("...br,...bs->...rs", old, new, precision=HIGHEST)


def random_transfer(old: jax.Array, new: jax.Array) -> jax.Array:
    r"""Returns R = (P_old^T P_old)^-1 P_old^T P_new, (*stack, r_old, r_new).

    For bases that are not orthonormal: M (P_old^T P_old)^-1 P_old^T is the least
    gradient whose projection is M, and M R its projection by the new basis. Columns of
    a small basis may coincide: 1e-6 of the mean diagonal is added to it.
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
    r"""The rule of LDAdam: transports the variance and the mean separately.

    After t updates, with both moments corrected for their start at zero,
    :math:`\hat M = M / (1 - b_1^t)` and :math:`\hat V = V / (1 - b_2^t)`,

    .. math::
        V' = (1 - b_2^t) \, | (\hat V - \hat M^2) (R \circ R) + (\hat M R)^2 |

    Args:
        b1: Decay of the first moment of the inner Adam; in [0, 1).
        b2: Decay of the second moment of the inner Adam; in [0, 1).

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
    """

    def second(nu, mu, r, count):
        # count is 0 only before the first basis, where the moments are zero.
        t = jnp.maximum(count, 1)
        correction = 1 - jnp.asarray(b2, nu.dtype) ** t
        mean = mu / (1 - jnp.asarray(b1, nu.dtype) ** t)
        variance = _exact(nu / correction - mean**2, r**2)
        return correction * jnp.abs(variance + _exact(mean, r) ** 2)

    return RebaseRule(_exact, second)


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
"""The named rules. The first moment follows exactly, M R, but for "keep" and "zero".

========  ==========================================================================
name      second moment
========  ==========================================================================
filled    V (R o R) + (1 - colsums(R o R)) rowmeans(V): what the old subspace did not
          hold of a new column counts as the mean of its row
square    V (R o R): exact for uncorrelated coordinates inside the old subspace, as if
          gradients were zero outside of it; the default
abs       abs(V R): depends on the signs of the basis' columns, which are arbitrary
ldadam    see :func:`ldadam_rebase`, with b1 = 0.9, b2 = 0.999
clamp     max(V R, 0): the paper's rule, kept from going negative; it starves columns
first     V: the expectation, where bases are random; the default there
keep      V, and M too: GaLore
zero      rowmeans(V), and M = 0: the optimizer starts again in the new subspace; V is
          not zero, for Adam's counter runs on and would not correct for it
========  ==========================================================================

No rule gives a negative second moment from a non-negative one. Second moments that are
too small make updates too large until they have filled up, which takes 1 / (1 - b2)
updates. The norm of Adam's updates after a refresh, by that before it, on noise that
does not change, where a new subspace has little of the old one (rank 32 of 128, b2 =
0.999, 200 updates between two refreshes):

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

In training "square" ended 0.5 % below "filled" all the same, at rates that were
searched under "square" (``RESULTS.md``): it is the default.
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
        rule: How they follow.
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
