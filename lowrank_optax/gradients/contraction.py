"""Sums of products of two arrays with labelled axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Labels = Sequence[Any]


def contract(
    first: jax.Array,
    first_labels: Labels,
    second: jax.Array,
    second_labels: Labels,
    labels: Labels,
    precision: Any = None,
    dtype: Any = None,
) -> jax.Array:
    """Returns one ``dot_general`` of two arrays, its axes in the order of ``labels``.

    Unlike ``einsum``, the product keeps the order of its operands, so that a precision
    per operand has its meaning.

    Args:
        first: The left operand.
        first_labels: Labels of the left operand's axes, each once.
        second: The right operand.
        second_labels: Labels of the right operand's axes, each once.
        labels: Labels of the result. Any other label is summed over.
        precision: ``precision`` of ``dot_general``.
        dtype: ``preferred_element_type``; None: the dtype of the operands.
    """
    first, first_labels = _summed(first, first_labels, (*second_labels, *labels))
    second, second_labels = _summed(second, second_labels, (*first_labels, *labels))
    shared = [label for label in first_labels if label in second_labels]
    batch = [label for label in shared if label in labels]
    summed = [label for label in shared if label not in labels]

    def places(own: Labels, wanted: Labels) -> tuple[int, ...]:
        return tuple(list(own).index(label) for label in wanted)

    common = jnp.promote_types(first.dtype, second.dtype)
    are_matrices = first.ndim == second.ndim == 2 and len(summed) == 1 and not batch
    if common.itemsize < 4 and not are_matrices and jax.default_backend() == "cpu":
        # XLA's CPU backend has few products of half precision into float32.
        common = jnp.promote_types(common, dtype or common)
    found = jax.lax.dot_general(
        first.astype(common),
        second.astype(common),
        (
            (places(first_labels, summed), places(second_labels, summed)),
            (places(first_labels, batch), places(second_labels, batch)),
        ),
        precision=precision,
        preferred_element_type=dtype,
    )
    free = [x for x in (*first_labels, *second_labels) if x not in shared]
    return found.transpose(places([*batch, *free], labels))


def _summed(array: jax.Array, labels: Labels, wanted: Labels):
    """Returns an array summed over all axes without a wanted label."""
    alone = tuple(i for i, label in enumerate(labels) if label not in wanted)
    kept = [label for label in labels if label in wanted]
    return (array.sum(alone) if alone else array), kept


def type_of_contraction(
    labels: Labels,
    sizes: Sequence[int],
    *sources: tuple[jax.Array, Sequence[Labels]],
) -> jax.ShapeDtypeStruct:
    """Returns a type with the shardings that the sources have for its labels.

    Args:
        labels: Labels of the type's axes.
        sizes: Sizes of the type's axes.
        sources: Arrays, each with the labels of each axis. The sharding of an axis with
            several labels is not used.
    """
    spec: dict[Any, Any] = dict.fromkeys(labels)
    used, mesh = set(), None
    for array, dims in sources:
        sharding = jax.typeof(array).sharding
        if AxisType.Explicit in getattr(sharding.mesh, "axis_types", ()):
            mesh = sharding.mesh
        for dim, part in zip(dims, sharding.spec, strict=False):
            names = {*part} if isinstance(part, tuple) else {part} - {None}
            is_wanted = len(dim) == 1 and dim[0] in spec and spec[dim[0]] is None
            if is_wanted and not names & used:
                spec[dim[0]] = part
                used |= names
    sharding = mesh and NamedSharding(mesh, PartitionSpec(*spec.values()))
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)
