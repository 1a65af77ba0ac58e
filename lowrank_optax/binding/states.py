"""Low-rank states, found anywhere inside the state of any optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lowrank_optax.binding.moments import owner_and_field
from lowrank_optax.codes import coded_record, is_coded, shape_of
from lowrank_optax.matrix.boxes import is_box, unboxed, with_contents
from lowrank_optax.projected import ProjectedSum
from lowrank_optax.rules.schedules import Trend
from lowrank_optax.subspace import ScaleByLowRankState, Subspace


def is_low_rank(node: Any) -> bool:
    """Returns whether a node is the state of a low-rank transformation."""
    return isinstance(node, ScaleByLowRankState) or _is_mapping_of(
        node, ScaleByLowRankState
    )


def low_rank_record(node: Any) -> ScaleByLowRankState:
    """Returns a low-rank state as a record, also from mappings of ``flax.nnx.split``.

    Raises:
        TypeError: If the node is not the state of a low-rank transformation.
    """
    if not is_low_rank(node):
        raise TypeError(
            f"the state is a {type(node).__name__}, not that of a low-rank "
            "transformation; was the state made by another optimizer?"
        )
    if not isinstance(node, ScaleByLowRankState):
        node = ScaleByLowRankState(**node)
    slots = jax.tree.map(_slot, node.subspaces, is_leaf=is_slot)
    return node._replace(subspaces=slots)


def is_slot(node: Any) -> bool:
    """Returns whether a node is the entry of one leaf in a low-rank state."""
    return isinstance(node, (Subspace, optax.MaskedNode)) or _is_mapping_of(
        node, Subspace
    )


def _slot(node: Any) -> Any:
    """Returns a leaf's entry as records: subspace, coded basis and trend."""
    if isinstance(node, Mapping):
        node = Subspace(**{"basis": (), "trend": (), "residual": (), **node})
    if not isinstance(node, Subspace):
        if jax.tree.leaves(node):
            raise ValueError(
                "the state's subspaces must be Subspace or, for a leaf at full size, "
                f"optax.MaskedNode(); got {type(node).__name__}."
            )
        return node
    trend = node.trend
    trend = Trend(**trend) if isinstance(trend, Mapping) and trend else trend
    return node._replace(basis=coded_record(node.basis), trend=trend)


# Fields that may be empty. An empty field is missing where a record became a mapping.
_MAY_BE_EMPTY = {"basis", "trend", "residual", "inner_state"}


def _is_mapping_of(node: Any, record: Any) -> bool:
    if not isinstance(node, Mapping):
        return False
    fields = set(record._fields)
    return fields - _MAY_BE_EMPTY <= set(node) <= fields


def _is_sum(node: Any) -> bool:
    if isinstance(node, Mapping) and set(node) == {"coordinates"}:
        return jax.tree_util.all_leaves(node.values())
    return isinstance(node, ProjectedSum)


def low_rank_states(state: Any) -> list[ScaleByLowRankState]:
    """Returns the states of all low-rank transformations in a state, unboxed."""
    nodes = jax.tree.leaves(unboxed(state), is_leaf=is_low_rank)
    return [low_rank_record(node) for node in nodes if is_low_rank(node)]


def map_low_rank_states(
    function: Callable[[ScaleByLowRankState], Any], state: Any
) -> Any:
    """Returns a state with the function applied to each low-rank state."""

    def of_node(node):
        return function(low_rank_record(node)) if is_low_rank(node) else node

    new = jax.tree.map(of_node, unboxed(state), is_leaf=is_low_rank)
    return as_given(new, state)


def as_given(new: Any, state: Any) -> Any:
    """Returns the arrays of a new state in the containers of the original state.

    Args:
        new: The new state, of records without boxes.
        state: The original state, with the same array names, in mappings or records,
            boxed or not.
    """
    if jax.tree.structure(new) == jax.tree.structure(state):
        return new
    arrays = {names(path): x for path, x in jax.tree.leaves_with_path(new)}

    def of_leaf(path, node):
        # A mask in a box has no array.
        is_array = bool(jax.tree.leaves(node))
        return with_contents(node, arrays[names(path)]) if is_array else node

    return jax.tree_util.tree_map_with_path(of_leaf, state, is_leaf=is_box)


def names(path: tuple) -> tuple[str, ...]:
    """Returns a key path as names, which are the same in any container."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def slots_of(node: ScaleByLowRankState) -> dict[tuple, Subspace]:
    """Returns the subspaces of a state by their leaves' key paths."""
    slots = jax.tree.leaves_with_path(node.subspaces, is_leaf=is_slot)
    return {path: slot for path, slot in slots if isinstance(slot, Subspace)}


def with_slots(subspaces: Any, slots: Mapping[tuple, Subspace]) -> Any:
    """Returns the tree of a state's subspaces with new subspaces.

    Args:
        subspaces: The old tree.
        slots: Key path -> new subspace, for all projected leaves.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, slot: slots.get(path, slot), subspaces, is_leaf=is_slot
    )


def all_slots(state: Any) -> dict[tuple, Subspace]:
    """Returns the subspaces of all low-rank states in a state, by key path."""
    slots: dict[tuple, Subspace] = {}
    for node in low_rank_states(state):
        slots |= slots_of(node)
    return slots


def stored_slots(state: Any) -> dict[tuple, Subspace]:
    """Returns those of :func:`all_slots` with a stored basis."""
    slots = all_slots(state).items()
    return {path: slot for path, slot in slots if jax.tree.leaves(slot.basis)}


# (key path, subspace) -> subspace; (key path, field, array) -> array
OfSlot = Callable[[tuple, Subspace], Subspace]
OfArray = Callable[[tuple, str, Any], Any]


def map_columns(state: Any, of_slot: OfSlot, of_array: OfArray) -> Any:
    """Returns a state with functions applied to subspaces and to arrays with columns.

    The arrays with columns are bases, moments and sums of projected gradients, coded or
    not, of leaves with a stored basis.

    Args:
        state: State of any optimizer that contains low-rank transformations.
        of_slot: Function of each leaf's subspace; runs before that of the basis.
        of_array: Function of each array. The field is "basis", a field of the inner
            state, or "sums".
    """
    stored = stored_slots(state)

    def has_columns(path: tuple, node: Any) -> bool:
        if path not in stored or not (is_coded(node) or hasattr(node, "shape")):
            return False
        stack, shape = stored[path].rank.shape, shape_of(node)
        ends_in_columns = shape[-1:] == shape_of(stored[path].basis)[-1:]
        is_stack = len(shape) == len(stack) + 2 and shape[: len(stack)] == stack
        return is_stack and ends_in_columns

    def of_slot_and_basis(path, node):
        if path not in stored or not isinstance(node, Subspace):
            return node
        return of_slot(path, node)._replace(basis=of_array(path, "basis", node.basis))

    def of_node(path, node):
        if _is_sum(node):
            owner, field = owner_and_field(path, stored.keys())
            if owner is None:
                return node
            (sums,) = jax.tree.leaves(node)
            return ProjectedSum(of_array(owner, field, sums))
        if not is_low_rank(node):
            return node
        node = low_rank_record(node)
        slots = jax.tree.leaves_with_path(node.subspaces, is_leaf=is_slot)
        owners = {path for path, _ in slots}

        def of_moment(path, node):
            owner, field = owner_and_field(path, owners)
            if owner is None or not has_columns(owner, node):
                return node
            return of_array(owner, field, coded_record(node))

        return node._replace(
            subspaces=jax.tree_util.tree_map_with_path(
                of_slot_and_basis, node.subspaces, is_leaf=is_slot
            ),
            inner_state=jax.tree_util.tree_map_with_path(
                of_moment, node.inner_state, is_leaf=is_coded
            ),
        )

    new = jax.tree_util.tree_map_with_path(
        of_node,
        unboxed(state),
        is_leaf=lambda node: _is_sum(node) or is_low_rank(node),
    )
    return as_given(new, state)


def arrays_by_leaf(state: Any) -> dict[tuple, dict[str, Any]]:
    """Returns the arrays with columns, by field, of each leaf with a stored basis.

    Args:
        state: State of any optimizer that contains low-rank transformations.

    Returns:
        Key path of the parameter -> "basis", fields of the inner state, "sums" of
        micro-batches -> array, coded or not.
    """
    found: dict[tuple, dict[str, Any]] = {}

    def collect(path, field, node):
        found.setdefault(path, {})[field] = node
        return node

    map_columns(state, lambda path, slot: slot, collect)
    return found
