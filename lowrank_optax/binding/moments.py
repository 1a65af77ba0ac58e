"""The moments in an inner transformation's state: their places and kinds."""

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax

from lowrank_optax.codes import is_coded, shape_of
from lowrank_optax.kinds import Kind
from lowrank_optax.matrix.arrays import leaf_name

# Of SM3 nu is the momentum, of Sophia the curvature.
_SIGNED = ("ScaleBySM3State", "SophiaState")


class Moment(NamedTuple):
    """One array of the inner state with coordinates in a subspace.

    Attributes:
        index: Position among the leaves of the inner state. An array in few bits counts
            as a single leaf.
        kind: "first" or "second".
    """

    index: int
    kind: Kind


def locate_moments(
    inner_state: Any,
    shapes: Mapping[tuple, tuple[int, ...]],
    other_paths: set[tuple],
    kinds: Mapping[str, Kind],
) -> dict[tuple, list[Moment]]:
    """Returns the moments of every projected leaf, by the leaf's key path.

    The path of an array is a field's name and then the key path of a parameter: the
    array belongs to this parameter. Scalars are counters and never moments, whatever
    their names.

    Args:
        inner_state: State of the inner transformation; arrays or their shapes.
        shapes: Key path of each projected leaf -> (*stack, a, r) of its coordinates.
        other_paths: Key paths of the leaves at full size.
        kinds: Field name -> kind; from :func:`lowrank_optax.kinds.kinds_of`.

    Raises:
        ValueError: If an array in a subspace, or an array without a parameter, has an
            unknown field; if the shape of a moment is not that of its coordinates.
    """
    if not shapes:
        return {}
    found: dict[tuple, list[Moment]] = {path: [] for path in shapes}
    leaves = jax.tree.leaves_with_path(inner_state, is_leaf=is_coded)
    for index, (path, leaf) in enumerate(leaves):
        shape = shape_of(leaf) if hasattr(leaf, "shape") or is_coded(leaf) else ()
        if not shape:
            continue
        owner, field = owner_and_field(path, shapes.keys() | other_paths)
        if owner in other_paths:
            continue
        kind = kinds.get(field)
        if kind == "constant":
            continue
        if kind is None or owner is None:
            raise ValueError(_unknown(path, field, shape))
        if shape != shapes[owner]:
            raise ValueError(
                f"{leaf_name(owner)}: projected gradients of shape "
                f"{shapes[owner]} do not fit {field!r} of shape {shape}; "
                "was the state made with another rank, side or granularity, or for "
                "other parameters or dimension_numbers?"
            )
        found[owner].append(Moment(index, kind))
    return found


def check_is_not_centered(state: Any, by: str) -> None:
    """Raises ValueError if a transformation takes the root of nu - mu^2.

    Args:
        state: Of an optimizer; arrays or their shapes.
        by: What changes mu and nu apart, for the message.
    """

    def is_centered(node):
        return type(node).__name__.startswith("ScaleByRStdDev")

    if any(map(is_centered, jax.tree.leaves(state, is_leaf=is_centered))):
        raise ValueError(
            "optax.scale_by_stddev (rmsprop with centered=True) takes the root of "
            f"nu - mu^2, which is negative, and so not a number, where {by}; use "
            "optax.scale_by_rms."
        )


def check_is_not_signed(state: Any) -> None:
    """Raises ValueError if a transformation calls something with both signs ``nu``.

    Args:
        state: Of an optimizer; arrays or their shapes.
    """

    def is_signed(node):
        return type(node).__name__ in _SIGNED

    for node in filter(is_signed, jax.tree.leaves(state, is_leaf=is_signed)):
        raise ValueError(
            f"{type(node).__name__}.nu has both signs, and nu is taken for a second "
            'moment; give low_bit(..., moments={"nu": "first"}).'
        )


def owner_and_field(path: tuple, owners: Set[tuple]) -> tuple[tuple | None, str]:
    """Returns the parameter of a state's array, and the name of the array's field.

    Args:
        path: Key path of the array.
        owners: Key paths of the parameters. The result is the longest of these paths at
            the end of ``path``, or None.
    """
    for start in range(len(path) + 1):
        suffix = tuple(path[start:])
        if suffix in owners:
            return suffix, _field(path[:start])
    return None, _field(path)


def _field(path) -> str:
    for key in reversed(path):
        if isinstance(key, jax.tree_util.GetAttrKey):
            return key.name
        if isinstance(key, jax.tree_util.DictKey):
            return str(key.key)
    return ""


def _unknown(path, field, shape) -> str:
    return (
        f"inner state field {field!r} at {leaf_name(path)} with shape "
        f"{tuple(shape)} has no re-basing rule; name its kind by "
        f"scale_by_low_rank(..., moments={{{field!r}: kind}}). A kind is 'first' "
        "(linear in the gradients, in their shape), 'second' (an average of their "
        "squares, in their shape) or 'constant' (independent of the basis)."
    )
