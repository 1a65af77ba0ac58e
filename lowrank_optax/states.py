"""Low-rank states where they stand: anywhere inside the state of any optimizer."""

from typing import Any

import jax
import optax

from lowrank_optax.low_rank import LowRankState
from lowrank_optax.plan import Announcement
from lowrank_optax.subspace import Parts, Projector, Subspace, projectors_of_state


def is_low_rank(node: Any) -> bool:
    """Returns whether a node is the state of a low-rank transformation."""
    return isinstance(node, LowRankState)


def is_slot(node: Any) -> bool:
    """Returns whether a node is what one leaf has in ``LowRankState.subspaces``."""
    return isinstance(node, (Subspace, optax.MaskedNode))


def low_rank_states(state: Any) -> list[LowRankState]:
    """Returns the states of all low-rank transformations in a state."""
    nodes = jax.tree.leaves(state, is_leaf=is_low_rank)
    return [node for node in nodes if is_low_rank(node)]


def slots_of(node: LowRankState) -> dict[tuple, Subspace]:
    """Returns the subspaces of a state by their leaves' key paths."""
    slots = jax.tree.leaves_with_path(node.subspaces, is_leaf=is_slot)
    return {path: slot for path, slot in slots if isinstance(slot, Subspace)}


def stored_slots(state: Any) -> dict[tuple, Subspace]:
    """Returns the subspaces with a stored basis, of all low-rank states in a state."""
    return {
        path: slot
        for node in low_rank_states(state)
        for path, slot in slots_of(node).items()
        if jax.tree.leaves(slot.basis)
    }


def own_parts(
    tree: Any, node: LowRankState, heard: list[Announcement]
) -> tuple[Any, Parts]:
    """Returns the part of a tree that a state's transformation sees, and its parts.

    Args:
        tree: Like the parameters of the whole optimizer.
        node: One of the low-rank states in the optimizer's state.
        heard: What the optimizer's transformations announce.

    Raises:
        ValueError: If two transformations project the same leaf.
    """
    paths = slots_of(node).keys()
    candidates = [who for who in heard if paths <= who.plans.keys()]
    if len(candidates) != 1:
        raise ValueError(
            "which low-rank transformation projects "
            f"{', '.join(map(jax.tree_util.keystr, paths))} cannot be told: "
            f"{len(candidates)} might. Was the state made by this optimizer, and does "
            "each leaf have one?"
        )
    plans, parts = candidates[0]
    leaves = dict(jax.tree.leaves_with_path(tree))
    own = jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[path] if path in plans else optax.MaskedNode(),
        node.subspaces,
        is_leaf=is_slot,
    )
    return own, parts


def projectors_of(
    params: Any, node: LowRankState, heard: list[Announcement]
) -> dict[tuple, Projector]:
    """Returns the projectors of the leaves that a low-rank state has subspaces of.

    Args:
        params: Parameters of the whole optimizer, or their shapes.
        node: One of the low-rank states in the optimizer's state.
        heard: What the optimizer's transformations announce.

    Raises:
        ValueError: If the state does not fit the parameters, or see :func:`own_parts`.
    """
    slots = slots_of(node)
    if not slots:
        return {}
    own, parts = own_parts(params, node, heard)
    return projectors_of_state(dict(jax.tree.leaves_with_path(own)), own, slots, parts)
