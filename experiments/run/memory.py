"""Bytes of a training state: in all, of the block matrices, and by kind."""

import math
from typing import Any

import jax
import optax

from experiments.model.groups import parameter_groups


def optimizer_state_bytes(opt_state: Any) -> int:
    """Returns the bytes of all arrays of a state, or of its shapes."""
    leaves = jax.tree.leaves(opt_state)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def adamw_state_bytes(params: Any) -> int:
    """Returns the bytes of ``optax.adamw``'s state for these parameters or shapes."""
    return optimizer_state_bytes(jax.eval_shape(optax.adamw(0.0).init, params))


def block_state(opt_state: Any) -> Any:
    """Returns the part that blocks have of the state of ``build_optimizer``."""
    # Methods may be partitioned themselves; what has "blocks" is ours.
    found = optax.tree.get_all_with_path(opt_state, "inner_states")
    return next(groups["blocks"] for _, groups in found if "blocks" in groups)


def block_leaves(params: Any) -> list[Any]:
    """Returns the leaves of ``params`` that are block matrices."""
    groups = jax.tree.leaves(parameter_groups(params))
    leaves = zip(jax.tree.leaves(params), groups, strict=True)
    return [leaf for leaf, group in leaves if group == "blocks"]


def memory_by_kind(params: Any, opt_state: Any) -> dict[str, int]:
    """Returns the bytes of a training state by what they are, for arrays or shapes.

    Returns:
        parameters; gradients (one per parameter, in its dtype); accumulator (sums over
        micro-batches); basis (projections of the block matrices); block moments
        (whatever else the method keeps for them); other moments (AdamW of embedding,
        head and norms, and counters).
    """
    blocks = block_state(opt_state)
    basis = sum(
        optimizer_state_bytes(value)
        for name in ("basis", "projector")
        for _, value in optax.tree.get_all_with_path(blocks, name)
    )
    block_bytes = optimizer_state_bytes(blocks)
    sums = optimizer_state_bytes(getattr(opt_state, "sums", ()))
    return {
        "parameters": optimizer_state_bytes(params),
        "gradients": optimizer_state_bytes(params),
        "accumulator": sums,
        "basis": basis,
        "block moments": block_bytes - basis,
        "other moments": optimizer_state_bytes(opt_state) - block_bytes - sums,
    }


def adamw_memory_by_kind(params: Any) -> dict[str, int]:
    """Returns :func:`memory_by_kind` of AdamW for all parameters, or shapes."""
    blocks = adamw_state_bytes(block_leaves(params))
    return {
        "parameters": optimizer_state_bytes(params),
        "gradients": optimizer_state_bytes(params),
        "accumulator": 0,
        "basis": 0,
        "block moments": blocks,
        "other moments": adamw_state_bytes(params) - blocks,
    }
