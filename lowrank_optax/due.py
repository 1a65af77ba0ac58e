"""When the basis of a matrix is due."""

import jax
import jax.numpy as jnp

from lowrank_optax.parts import Parts
from lowrank_optax.subspace import Subspace

# A matrix in which no basis is found is asked again after 1, 2, 4, ... updates, up to
# 2 to this power.
LONGEST_WAIT = 7


def is_due(subspace: Subspace, count: jax.Array, parts: Parts) -> jax.Array:
    """Returns whether the next update is to renew a basis, bool (*stack,).

    Args:
        subspace: Of the leaf.
        count: Updates done.
        parts: Of the transformation.
    """
    wanted = parts.refresh.is_due(subspace.age, subspace.trend)
    # All that wait ask on the same updates: one of them makes its whole stack compute.
    doublings = jnp.clip(subspace.failures - 1, 0, LONGEST_WAIT)
    is_asked = count % jnp.left_shift(1, doublings) == 0
    return is_asked & (wanted | (subspace.refreshes == 0))


def asked(
    subspace: Subspace, count: jax.Array, parts: Parts, again: bool | jax.Array
) -> tuple[jax.Array, Subspace]:
    """Returns which matrices are to be renewed now, bool (*stack,), and from what.

    Args:
        subspace: Of the leaf.
        count: Updates done.
        parts: Of the transformation.
        again: Whether gradients of the next update have been seen already; False, or
            (), bool. A basis does not change then. A matrix that has none yet has
            nothing in it either, and may get one: on the updates that ask for it, and
            failing many times in one update counts once.
    """
    due = is_due(subspace, count, parts)
    if again is False:
        return due, subspace
    # Before this update, in which it may have failed once.
    failures = jnp.maximum(subspace.failures - 1, 0)
    retried = is_due(subspace._replace(failures=failures), count, parts)
    # A random basis is there before it is drawn.
    retried &= again & (subspace.refreshes == 0) & (not parts.is_random)
    failures = jnp.where(retried, failures, subspace.failures)
    return (due & ~again) | retried, subspace._replace(failures=failures)
