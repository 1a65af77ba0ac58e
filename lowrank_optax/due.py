"""Decides when the basis of a matrix is due."""

from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.binding.optimizer import Binding
from lowrank_optax.binding.states import all_slots, low_rank_states, slots_of
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.parts import Parts
from lowrank_optax.subspace import Subspace, fraction_of

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


def due_by_path(
    binding: Binding, state: Any, ahead: int = 0, *, drawn: bool = False
) -> dict[str, jax.Array]:
    """Returns, for each leaf with a basis, whether an update has to renew it.

    Args:
        binding: Binding of the optimizer.
        state: State of the optimizer.
        ahead: Updates between this state and the update in question. The answer is
            exact for ``every``; ``on_convergence`` knows only the norms so far.
        drawn: Whether to list leaves with random bases too.

    Returns:
        Key path -> bool, (): whether a basis of the leaf's stack is due.
    """
    due = {}
    for node in low_rank_states(state):
        for path, slot in slots_of(node).items():
            parts = binding.of(node).parts
            if parts.is_random and not drawn:
                continue
            later = slot._replace(age=slot.age + ahead)
            found = is_due(later, node.count + ahead, parts)
            due[leaf_name(path)] = jnp.any(found)
    return due


def attempts_by_path(state: Any) -> dict[str, jax.Array]:
    """Returns, for each leaf with a basis, how often its bases were to be renewed.

    Returns:
        Key path -> int32 (2, *stack); renewals, and failures since the last one.
    """
    return {
        leaf_name(path): jnp.stack([slot.refreshes, slot.failures])
        for path, slot in all_slots(state).items()
    }


def due_next(
    binding: Binding, state: Any, steps: int, early: Set[str]
) -> dict[str, jax.Array]:
    """Returns, for each leaf with a basis, which of the next updates renew it.

    Args:
        binding: Binding of the optimizer.
        state: State of the optimizer.
        steps: Number of updates.
        early: Key paths of leaves whose bases are computed one update early.

    Returns:
        Key path -> bool (steps,), the next update first. Exact for ``every``, unless a
        gradient is zero or not finite.
    """
    found = {}
    for node in low_rank_states(state):
        parts, slots = binding.of(node).parts, slots_of(node)
        for position, (path, slot) in enumerate(slots.items()):
            name, due = leaf_name(path), []
            first = parts.refresh.first_age(fraction_of(position, len(slots)))
            is_first = slot.refreshes == 0
            slot = slot._replace(age=slot.age + int(name in early))
            for step in range(steps):
                now = is_due(slot, node.count + step, parts)
                due.append(jnp.any(now))
                begins = jnp.where(is_first, first, 0)
                age = jnp.where(now, begins, slot.age) + 1
                refreshes = jnp.where(now, 1, slot.refreshes)
                slot = slot._replace(age=age, refreshes=refreshes)
                is_first &= ~now
            found[name] = jnp.array(due)
    return found


def due_again(binding: Binding, state: Any, within: int) -> dict[str, jax.Array]:
    """Returns, for each leaf with a basis, whether a new basis is soon due again.

    Args:
        binding: Binding of the optimizer.
        state: State of the optimizer.
        within: Updates behind a renewal.

    Returns:
        Key path -> bool, (): whether a basis is due at one of these updates.
    """
    found = {}
    for node in low_rank_states(state):
        for path, slot in slots_of(node).items():
            rule = binding.of(node).parts.refresh
            ages = [jnp.full_like(slot.age, age) for age in range(1, within + 1)]
            each = [jnp.any(rule.is_due(age, slot.trend)) for age in ages]
            found[leaf_name(path)] = jnp.any(jnp.array(each))
    return found
