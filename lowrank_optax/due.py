"""Decides when the basis of a matrix is due."""

import jax
import jax.numpy as jnp

from lowrank_optax.parts import Parts
from lowrank_optax.subspace import Subspace

# After a failed refresh the next tries come after 1, 2, 4, ... updates, up to 2 to this
# power.
LONGEST_WAIT = 7


def is_due(subspace: Subspace, count: jax.Array, parts: Parts) -> jax.Array:
    """Returns whether the next update should renew a basis, bool (*stack,).

    Args:
        subspace: Subspace of the leaf.
        count: Updates done.
        parts: Parts of the transformation.
    """
    wanted = parts.refresh.is_due(subspace.age, subspace.trend)
    # Failed matrices try again at common updates: one try computes its whole stack.
    doublings = jnp.clip(subspace.failures - 1, 0, LONGEST_WAIT)
    is_asked = count % jnp.left_shift(1, doublings) == 0
    return is_asked & (wanted | (subspace.refreshes == 0))


def asked(
    subspace: Subspace, count: jax.Array, parts: Parts, again: bool | jax.Array
) -> tuple[jax.Array, Subspace]:
    """Returns the matrices to renew now, bool (*stack,), and the subspace before it.

    Args:
        subspace: Subspace of the leaf.
        count: Updates done.
        parts: Parts of the transformation.
        again: Whether an earlier micro-batch of the same update came before; False, or
            (), bool. If so, a basis does not change. A matrix without a basis has no
            coordinates yet, and may still get a basis, if one is due at this update.
            Several failures in one update count as one.
    """
    due = is_due(subspace, count, parts)
    if again is False:
        return due, subspace
    # The failures before this update: this update may have added one.
    failures = jnp.maximum(subspace.failures - 1, 0)
    retried = is_due(subspace._replace(failures=failures), count, parts)
    # A random basis exists even before its first draw.
    retried &= again & (subspace.refreshes == 0) & (not parts.is_random)
    failures = jnp.where(retried, failures, subspace.failures)
    return (due & ~again) | retried, subspace._replace(failures=failures)
