"""Which bases the next steps renew, from the optimizer's state, on the device."""

from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.binding.optimizer import Binding
from lowrank_optax.due import attempts_by_path, due_again, due_by_path, due_next
from lowrank_optax.training.renewals import (
    AHEAD,
    ALWAYS,
    first_register,
    next_register,
)


def register_before(binding: Binding, state: Any, sketched: Set[str]) -> jax.Array:
    """Returns the register before the first step; see :func:`first_register`.

    Args:
        binding: Of the optimizer.
        state: Of the optimizer.
        sketched: Key paths of the leaves whose bases are renewed from sketches.
    """
    due = due_next(binding, state, AHEAD + 1, sketched)
    return first_register(list(due.values()))


def register_behind(
    binding: Binding, register: jax.Array, before: Any, state: Any, sketched: Set[str]
) -> jax.Array:
    """Returns the register behind a step; see :func:`next_register`.

    Args:
        binding: Of the optimizer.
        register: The register before the step.
        before: The optimizer's state before the step.
        state: The optimizer's state behind the step.
        sketched: As for :func:`register_before`.
    """
    old, new = attempts_by_path(before), attempts_by_path(state)
    left = due_by_path(binding, state, drawn=True)
    renewed = [jnp.any(new[path] != old[path]) for path in left]
    return next_register(
        register,
        jnp.array(renewed, bool),
        jnp.array(list(left.values()), bool),
        _due(binding, state, sketched),
    )


def _due(binding: Binding, state: Any, sketched: Set[str]) -> jax.Array:
    """Returns what the step has to renew that comes AHEAD steps after the next one.

    A sketch makes the basis of the next step, so that it is computed one earlier.

    Returns:
        int8 (bases,), see :mod:`lowrank_optax.training.renewals`.
    """
    soon, later = (
        due_by_path(binding, state, AHEAD + more, drawn=True) for more in (0, 1)
    )
    again = due_again(binding, state, AHEAD)
    due = {path: (later if path in sketched else soon)[path] for path in soon}
    due = {path: x.astype(jnp.int8) for path, x in due.items()}
    each = [jnp.where(again[path], ALWAYS, x) for path, x in due.items()]
    return jnp.array(each, jnp.int8)
