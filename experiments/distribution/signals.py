"""A signal that one process hears stops all of them, behind the same step."""

import collections
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.distribution import processes
from experiments.distribution.mesh import whole


class SharedSignal:
    """What all processes know of a signal, one step like the other.

    Each step hands the devices the number of the signal that its process has heard, and
    they exchange the largest. No process waits for that: a step hears of the signal a
    few steps later, the same step in all processes.

    Args:
        own: Returns the signal that this process has heard of; None: none.
        mesh: The devices.
        ahead: How many steps later.
    """

    def __init__(
        self, own: Callable[[], signal.Signals | None], mesh: Mesh, ahead: int
    ):
        self._own, self._ahead = own, ahead
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._largest = jax.jit(jnp.max, out_shardings=whole(mesh))

    def heard(self) -> signal.Signals | None:
        """Returns the signal that the run stops for; all call it once each step."""
        own = self._own()
        if processes.count() == 1:
            return own
        mine = np.full(self._shape, own or 0, np.int32)
        found = jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: mine[index]
        )
        self._pending.append(self._largest(found))
        if len(self._pending) <= self._ahead:
            return None
        number = int(self._pending.popleft())
        return signal.Signals(number) if number else None
