"""Which bases the next steps renew, known on the host without waiting for the device.

The state behind a step says what a later step has to renew. The states of the steps in
between say the same once more, and this is left out: host and device both know what has
been renewed meanwhile.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Steps that may be in flight: what a step renews is read off the state so far back.
AHEAD = 2
# What a step has to renew, by basis. ALWAYS: even right behind another renewal. RETRY:
# likewise, because a step that had to renew it has not.
NOT_DUE, DUE, ALWAYS, RETRY = 0, 1, 2, 3


def first_register(due: Sequence[jax.Array]) -> jax.Array:
    """Returns the register before the first step.

    A register is int8 (AHEAD + 1, bases): what the next steps have to renew, the next
    step first.

    Args:
        due: bool (AHEAD + 1,) for each basis: whether these steps have to renew it.
    """
    rows = jnp.array(due, bool).reshape(-1, AHEAD + 1).T
    return jnp.where(rows, ALWAYS, NOT_DUE).astype(jnp.int8)


def next_register(
    register: jax.Array, renewed: jax.Array, is_left: jax.Array, due: jax.Array
) -> jax.Array:
    """Returns the register behind a step.

    Args:
        register: The register before the step.
        renewed: bool (bases,); what the step has renewed.
        is_left: bool (bases,); what is due still. Where the step had to renew it, its
            update was left out, as under ``optax.conditionally_mask``. Who waits for
            the step after :data:`AHEAD` others, again and again, might meet none that
            has an update.
        due: int8 (bases,); what the step has to renew that comes AHEAD steps after the
            next one, as the state behind the step says.
    """
    later = jnp.where(renewed[None] & (register[1:] == DUE), NOT_DUE, register[1:])
    asked = (register[0] > 0) | jnp.any(register == RETRY, axis=0)
    due = jnp.where(asked & ~renewed & is_left, RETRY, due)
    return jnp.concatenate([later, due[None]])


class Renewals:
    """What is due, step by step, on the host.

    Args:
        register: The register before the next step.
    """

    def __init__(self, register: Any):
        self._rows = collections.deque(np.asarray(register))
        self._renewed = collections.deque(maxlen=AHEAD)

    def observe(self, due: Any) -> None:
        """Takes what the newest state has said.

        Args:
            due: int8 (bases,), an array of the device, not waited for.
        """
        self._rows.append(due)

    def next(self) -> np.ndarray:
        """Returns which bases the next step renews, bool (bases,).

        It waits for the step before the last :data:`AHEAD`.
        """
        due = np.asarray(self._rows.popleft())
        just_now = np.any(self._renewed, axis=0) if self._renewed else False
        renews = (due >= ALWAYS) | ((due == DUE) & ~np.asarray(just_now))
        self._renewed.append(renews)
        return renews
