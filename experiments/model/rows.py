"""Activations on a mesh: every device keeps the sequences that it has."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

# Axes of the mesh that the sequences of a batch are shared out over.
BATCH_AXES = ("data", "fsdp")


def keep_rows(x: jax.Array) -> jax.Array:
    """Returns activations (B, ...) or (B T, ...), cut along B alone.

    Parameters that are cut over the axis of the sequences would otherwise leave the
    compiler the choice between gathering them and cutting the activations up.

    Args:
        x: Activations, in a program that is traced under :func:`jax.set_mesh`. Without
            a mesh, or where no parameter is cut, x is returned as it is.
    """
    return _cut(x, BATCH_AXES)


def for_table(tokens: jax.Array) -> jax.Array:
    """Returns tokens to be looked up, (B, T), each with the neighbours along fsdp.

    fsdp cuts the table along d. A device looks up its share of d for the sequences of
    its neighbours too, and :func:`from_table` lets them exchange the shares. Otherwise
    the compiler may gather the table, and add up its gradient over all devices.

    Args:
        tokens: In a program as for :func:`keep_rows`.
    """
    return _cut(tokens, "data")


def from_table(x: jax.Array) -> jax.Array:
    """Returns rows that were looked up, (B, T, d) or (B T, d), cut along B alone.

    Args:
        x: Rows of a table, by :func:`for_table`.
    """
    return keep_rows(_cut(x, "data", *[None] * (x.ndim - 2), "fsdp"))


def _cut(x: jax.Array, *spec: Any) -> jax.Array:
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    others = [size for name, size in shape.items() if name != "data"]
    if not set(BATCH_AXES) <= shape.keys() or max(others) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
