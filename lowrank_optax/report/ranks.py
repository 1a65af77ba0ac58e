"""Subspaces and ranks in a state, read on the host."""

from typing import Any

import jax
import numpy as np

from lowrank_optax.binding.states import all_slots
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.subspace import Subspace


def subspaces(state: Any) -> dict[str, Subspace]:
    """Returns the subspace of each projected leaf by its path.

    Args:
        state: State of any optimizer that contains low-rank transformations.

    Returns:
        Path of the parameter, as :func:`lowrank_optax.projections` has it, -> subspace.
    """
    return {leaf_name(path): slot for path, slot in all_slots(state).items()}


def ranks(state: Any) -> dict[str, np.ndarray]:
    """Returns the rank in use of each projected leaf by its path.

    Args:
        state: State of any optimizer that contains low-rank transformations. The call
            reads arrays, and so waits for the device.

    Returns:
        Key path -> ranks, int32, shape (*stack,): () for a single matrix. A leaf at
        full size has no entry; :func:`lowrank_optax.projections` gives the reason.

    Example:
        >>> import lowrank_optax, jax.numpy as jnp
        >>> params = {"blocks": jnp.ones((3, 64, 16)), "bias": jnp.ones(16)}
        >>> ranks(lowrank_optax.galore(1e-2, rank=4).init(params))
        {"['blocks']": array([4, 4, 4], dtype=int32)}
    """
    in_use = {path: subspace.rank for path, subspace in subspaces(state).items()}
    return jax.tree.map(np.asarray, jax.device_get(in_use))
