"""``by_role``: an optimizer for each role of leaves in a model."""

from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np
import optax

from lowrank_optax.binding.optimizer import announce_roles
from lowrank_optax.matrix.arrays import as_arrays, leaf_name
from lowrank_optax.matrix.boxes import is_box
from lowrank_optax.matrix.inference import seen_in
from lowrank_optax.matrix.roles import Assigned, Patterns, assigned_roles

Part = optax.GradientTransformation | optax.ScalarOrSchedule
"""A transformation, or a learning rate for AdamW with optax's defaults."""


def by_role(
    hidden: Part,
    vocabulary: Part,
    vectors: Part | None = None,
    *,
    patterns: Patterns | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives hidden matrices, vocabulary and vectors an optimizer each.

    This is ``optax.partition`` with the labels of :func:`lowrank_optax.roles`. Low-rank
    methods are meant for the hidden matrices of a model. Published runs train the
    embedding, the head, norms and biases with AdamW, at a learning rate of their own.

    Each argument is a transformation, or a learning rate. A learning rate, a number or
    a schedule, stands for ``optax.adamw(learning_rate)``. Leaves with the role
    "frozen" have no optimizer state, and their updates are zero.

    :func:`lowrank_optax.projections` lists the role and the plan of every leaf. The
    axes of matrices are read from names in the whole model, see
    :func:`lowrank_optax.dimension_numbers_by_name`; a plain ``optax.partition`` hides
    the neighbours of a leaf. The other helpers of the library see through both.

    Args:
        hidden: For the hidden matrices and their stacks over layers and experts.
        vocabulary: For embeddings and the head.
        vectors: For norms, biases and scalars. None: as ``vocabulary``.
        patterns: {regular expression, searched in a leaf's key path: "hidden",
            "vocabulary", "vectors" or "frozen"}. See :func:`lowrank_optax.roles`.

    Returns:
        A transformation with the state ``optax.PartitionState``. Its ``update`` needs
        ``params``.

    Raises:
        TypeError: If an argument is neither a transformation nor a learning rate.
        ValueError: In ``init``, if no leaf is a hidden matrix, or ``patterns`` does not
            fit; see :func:`lowrank_optax.roles`. In ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lowrank_optax
        >>> tx = by_role(lowrank_optax.low_rank_muon(8e-3, rank=4), vocabulary=16e-3)
        >>> params = {"embed": jnp.ones((50, 8)), "up": jnp.ones((8, 32)),
        ...           "norm": jnp.ones(8)}
        >>> for plan in lowrank_optax.projections(tx, params).values():
        ...     print(plan)
        ['embed'] 50x8: vocabulary (by its name), full size, with another optimizer
        ['norm'] 8: vectors (fewer than two axes), full size, with another optimizer
        ['up'] 8x32: hidden (a matrix), (8 x 32), rows projected, 8 -> 4
    """
    vectors = vocabulary if vectors is None else vectors
    parts: dict[Hashable, optax.GradientTransformation] = {
        "hidden": _transformation("hidden", hidden),
        "vocabulary": _transformation("vocabulary", vocabulary),
        "vectors": _transformation("vectors", vectors),
        "frozen": optax.set_to_zero(),
    }

    def partition(params):
        found = assigned_roles(params, patterns)
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: found[path].role, params, is_leaf=is_box
        )
        # A module of Equinox may be callable: optax would call it.
        return found, optax.partition(parts, lambda _: labels)

    def init(params):
        params = as_arrays(params)
        found, optimizer = partition(params)
        _check_hidden(found)
        announce_roles(found)
        with seen_in(params):
            return optimizer.init(params)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "by_role reads the roles from the parameters; call update(updates, "
                "state, params)."
            )
        params = as_arrays(params)
        with seen_in(params):
            return partition(params)[1].update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _transformation(role: str, part: Any) -> optax.GradientTransformation:
    """Returns the transformation that an argument stands for."""
    if isinstance(part, optax.GradientTransformation):
        return part
    is_number = isinstance(part, (int, float, np.number, np.ndarray, jax.Array))
    if callable(part) or (is_number and not isinstance(part, bool)):
        return optax.adamw(cast("optax.ScalarOrSchedule", part))
    raise TypeError(
        f"{role} must be an optax.GradientTransformation or a learning rate, got "
        f"{part!r}."
    )


def _check_hidden(found: Mapping[tuple, Assigned]) -> None:
    if any(assigned.role == "hidden" for assigned in found.values()):
        return
    listed = [f"{leaf_name(p)} {assigned}" for p, assigned in found.items()]
    raise ValueError(
        f"no leaf of {len(found)} is a hidden matrix: {', '.join(listed[:4])}"
        f"{', ...' if len(listed) > 4 else ''}. Give patterns={{regular expression: "
        "'hidden'}, or use the optimizer without by_role."
    )
