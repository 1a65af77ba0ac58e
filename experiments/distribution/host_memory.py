"""The optimizer's state in the host's memory, on the devices around its uses alone."""

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


def on_devices(tree: Any, shardings: Any) -> Any:
    """Returns the arrays, those in the host's memory moved to the devices.

    It can be traced.

    Args:
        tree: Arrays.
        shardings: A tree like it, or one sharding for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        return tree

    def of_leaf(x, sharding):
        return jax.device_put(x, _moved(sharding)) if is_pinned(sharding) else x

    return jax.tree.map(of_leaf, tree, shardings)


def moved_late(tree: Any, shardings: Any, used: Any, left: Any, after: Any) -> Any:
    """Returns a traced state for its update, what was not changed yet moved anew.

    Bases are needed for the gradients, and moments behind them. An array that is moved
    before and needed behind would take its bytes beside the activations. It is moved
    once more instead, when all gradients are there.

    Args:
        tree: Arrays, where the shardings say.
        shardings: A tree like it, or one sharding for all.
        used: The arrays on the devices, from which gradients were computed.
        left: What the gradients' function returned of these.
        after: The gradients.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        return left
    flat, structure = jax.tree.flatten(tree)
    kinds, befores, afters = map(jax.tree.leaves, (shardings, used, left))
    same = [
        is_pinned(kind) and x is y
        for kind, x, y in zip(kinds, befores, afters, strict=True)
    ]
    waiting = [x for x, late in zip(flat, same, strict=True) if late]
    places = [_moved(kind) for kind, late in zip(kinds, same, strict=True) if late]
    waiting, _ = jax.lax.optimization_barrier((waiting, after))
    moved = iter(jax.device_put(waiting, places))
    chosen = [next(moved) if late else x for late, x in zip(same, afters, strict=True)]
    return jax.tree.unflatten(structure, chosen)


def _moved(sharding: Any) -> Any:
    return sharding.with_memory_kind(DEVICE)
