"""A state in the host's memory, on the devices around its uses alone."""

from typing import Any

import jax

DEVICE, PINNED = "device", "pinned_host"


def is_pinned(x: Any) -> bool:
    """Returns whether an array, a shape or a sharding is in the host's memory."""
    return getattr(x, "sharding", x).memory_kind == PINNED


def on_devices(tree: Any, shardings: Any) -> Any:
    """Returns the arrays, those in the host's memory moved to the devices.

    It can be traced.

    Args:
        tree: Arrays.
        shardings: A tree like it; None: all arrays are on the devices.
    """
    if shardings is None:
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
        shardings: A tree like it; None: all arrays are on the devices.
        used: The arrays on the devices, from which gradients were computed.
        left: What the gradients' function returned of these.
        after: The gradients.
    """
    if shardings is None:
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
