"""Which arrays of a run lie in the host's memory: ``--state-memory``."""

from typing import Any

import jax
from jax.sharding import Mesh

from experiments.errors import UserError

DEVICE, PINNED = "device", "pinned_host"
# What is smaller stays on the devices: counters, keys, ranks, the state of norms.
LEAST_BYTES = 65_536


def check_memory(kind: str, mesh: Mesh) -> None:
    """Raises UserError if the devices have no memory of this kind.

    Args:
        kind: :data:`DEVICE` or :data:`PINNED`.
        mesh: The devices.
    """
    if kind != PINNED:
        return
    device = mesh.local_devices[0]
    found = [memory.kind for memory in device.addressable_memories()]
    if kind not in found:
        raise UserError(
            f"--state-memory {kind}: JAX offers the memories {', '.join(found)} for "
            f"{device.device_kind} ({device.platform}); leave --state-memory out"
        )


def in_host_memory(shapes: Any) -> Any:
    """Returns the shapes of a state, the large arrays in the host's memory.

    Args:
        shapes: ``jax.ShapeDtypeStruct`` with shardings. Arrays below
            :data:`LEAST_BYTES` stay where they are.
    """

    def of_leaf(x):
        if x.size * x.dtype.itemsize < LEAST_BYTES:
            return x
        sharding = x.sharding.with_memory_kind(PINNED)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(of_leaf, shapes)


def is_pinned(x: Any) -> bool:
    """Returns whether an array, a shape or a sharding is in the host's memory."""
    return getattr(x, "sharding", x).memory_kind == PINNED


def device_shardings(tree: Any) -> Any:
    """Returns the shardings of arrays, those in the host's memory on the devices."""
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(DEVICE), tree)
