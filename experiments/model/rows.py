"""Activations on a mesh: every device keeps the sequences that it has."""

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
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    others = [size for name, size in shape.items() if name != "data"]
    if not set(BATCH_AXES) <= shape.keys() or max(others) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
