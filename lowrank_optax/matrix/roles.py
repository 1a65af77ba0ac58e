"""The role of each leaf in a model: hidden matrix, vocabulary, vector or frozen."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.boxes import is_box, leaves_by_path
from lowrank_optax.matrix.inference import Inferred, inferred
from lowrank_optax.matrix.names import (
    Leaf,
    is_head,
    is_of_layers,
    is_of_vocabulary,
    is_unnamed,
    named_leaves,
)

Role = Literal["hidden", "vocabulary", "vectors", "frozen"]
"""The role of a leaf in its model."""

Patterns = Mapping[str, Role]
"""Regular expression, searched in key paths -> role of the leaves with a match."""


class Assigned(NamedTuple):
    """The role of a leaf.

    Attributes:
        role: One of the four roles.
        reason: Why the leaf has this role.
    """

    role: Role
    reason: str

    def __str__(self) -> str:
        return f"{self.role} ({self.reason})"


def roles(params: Any, patterns: Patterns | None = None) -> Any:
    """Returns the role of every leaf, as labels for ``optax.partition``.

    - ``"vectors"``: a leaf without a matrix. Norms, biases, scalars, and their stacks
      over layers; :func:`lowrank_optax.dimension_numbers_by_name` finds them.
    - ``"vocabulary"``: an embedding or a head. The name of a module tells
      (``embed_tokens``, ``wte``, ``token_embedder``, ``lm_head``, ``logits_dense``), or
      the name ``vocab`` of an axis in a box. A head of another name is recognised by
      its shape, if it alone has the two lengths of an embedding.
    - ``"hidden"``: every other matrix, and every stack of matrices.
    - ``"frozen"``: a leaf of another dtype than real floats, or named by a pattern.

    Args:
        params: Tree of arrays or shapes.
        patterns: {regular expression: role}. ``re.search`` looks for the expression in
            a key path as ``jax.tree_util.keystr`` writes it, such as
            ``['layers'][0]['router']['kernel']``. A pattern overrides names and
            shapes.

    Returns:
        A tree like ``params`` of these four words, with a word in place of each box.

    Raises:
        ValueError: If a pattern finds no leaf or is no regular expression; if a role
            has another name; if two patterns give a leaf two roles; if a pattern makes
            a leaf with fewer than two axes a hidden matrix; if no leaf has a name.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": jnp.ones((50, 8)), "up": jnp.ones((8, 32))}
        >>> roles(params)
        {'embed': 'vocabulary', 'up': 'hidden'}
        >>> roles(params, {"up": "frozen"})
        {'embed': 'vocabulary', 'up': 'frozen'}
    """
    found = assigned_roles(params, patterns)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: found[path].role, params, is_leaf=is_box
    )


def assigned_roles(
    params: Any, patterns: Patterns | None = None
) -> dict[tuple, Assigned]:
    """Returns the role of each leaf by its key path; see :func:`roles`."""
    leaves = named_leaves(params)
    arrays = leaves_by_path(params)
    said = _said(leaves, patterns or {})
    if leaves and len(said) < len(leaves) and all(map(is_unnamed, leaves)):
        raise ValueError(
            "no leaf has a name that tells its role: the key paths are like "
            f"{leaf_name(leaves[0].path)}. Give a dictionary of names, such as "
            "{variable.path: variable.value}, or patterns for all leaves."
        )
    numbers = inferred(params)
    heads = _heads(leaves, numbers)

    def of_leaf(leaf):
        if leaf.path in said:
            return said[leaf.path]
        if not jnp.issubdtype(arrays[leaf.path].dtype, jnp.floating):
            return Assigned("frozen", f"its dtype is {arrays[leaf.path].dtype}")
        if numbers[leaf.path].numbers is None:
            return Assigned("vectors", numbers[leaf.path].reason)
        if is_of_vocabulary(leaf):
            return Assigned("vocabulary", "by its name")
        if leaf.path in heads:
            return Assigned("vocabulary", f"the lengths of {heads[leaf.path]}")
        return Assigned("hidden", "a matrix")

    return {leaf.path: of_leaf(leaf) for leaf in leaves}


def _heads(leaves: list[Leaf], numbers: Mapping[tuple, Inferred]) -> dict[tuple, str]:
    """Returns the path of a head without a telling name, and its embedding's name.

    An embedding is vocabulary x width, and so is the head or its transpose. If several
    matrices have these two lengths, no matrix counts as a head. Where a head has a
    telling name, there is no other.
    """
    matrices = [leaf for leaf in leaves if numbers[leaf.path].numbers is not None]
    if any(map(is_head, matrices)):
        return {}
    found: dict[tuple, str] = {}
    for embedding in filter(is_of_vocabulary, matrices):
        alike = [
            leaf
            for leaf in matrices
            if sorted(leaf.shape) == sorted(embedding.shape)
            and not is_of_vocabulary(leaf)
        ]
        is_told = len({*embedding.shape}) == len(embedding.shape) == 2
        if is_told and len(alike) == 1 and not is_of_layers(alike[0]):
            found[alike[0].path] = leaf_name(embedding.path)
    return found


def _said(leaves: list[Leaf], patterns: Patterns) -> dict[tuple, Assigned]:
    """Returns the roles that patterns give."""
    found: dict[tuple, tuple[str, Role]] = {}
    for pattern, role in patterns.items():
        if role not in get_args(Role):
            raise ValueError(
                f"patterns[{pattern!r}] must be one of {', '.join(get_args(Role))}, "
                f"got {role!r}."
            )
        try:
            of_pattern = [x for x in leaves if re.search(pattern, leaf_name(x.path))]
        except re.error as error:
            raise ValueError(
                f"patterns: {pattern!r} is no regular expression: {error}."
            ) from error
        if not of_pattern:
            some = ", ".join(leaf_name(x.path) for x in leaves[:3])
            raise ValueError(
                f"patterns: {pattern!r} finds no leaf; key paths are like {some}."
            )
        for leaf in of_pattern:
            other, before = found.setdefault(leaf.path, (pattern, role))
            if before != role:
                raise ValueError(
                    f"patterns: {other!r} makes {leaf_name(leaf.path)} {before}, and "
                    f"{pattern!r} makes it {role}; narrow one of them."
                )
            if role == "hidden" and len(leaf.shape) < 2:
                raise ValueError(
                    f"patterns: {pattern!r} makes {leaf_name(leaf.path)} of shape "
                    f"{leaf.shape} a hidden matrix; a matrix has two axes. Narrow the "
                    "pattern, or give it the role vectors."
                )
    return {
        path: Assigned(role, f"pattern {pattern!r}")
        for path, (pattern, role) in found.items()
    }
