"""Where the arrays of a training loop are between its steps."""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec


class Placed(NamedTuple):
    """Where arrays are between steps: trees of shardings.

    Attributes:
        params: Of the parameters.
        optimizer: Of the optimizer's state. What is in the host's memory is on the
            devices around its uses alone.
    """

    params: Any
    optimizer: Any


def mesh_of(*trees: Any) -> Any:
    """Returns the mesh that all arrays are on; None: there is none."""
    found = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(trees)]
    meshes = [
        sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)
    ]
    return meshes[0] if found and len(meshes) == len(found) else None


def placed_of(params: Any, optimizer: Any) -> Placed:
    """Returns the shardings of arrays that all are on a mesh."""
    if mesh_of(params, optimizer) is None:
        return Placed(None, None)
    return Placed(*jax.tree.map(lambda x: x.sharding, (params, optimizer)))


def whole_on(mesh: Any) -> NamedSharding:
    """Returns the sharding of an array that each device has a whole copy of."""
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(tree: Any, mesh: Any) -> Any:
    """Returns the arrays, those that are on no mesh copied to each device."""

    def of_leaf(x):
        is_there = isinstance(x.sharding, NamedSharding)
        return x if is_there else jax.device_put(x, whole_on(mesh))

    return jax.tree.map(of_leaf, tree)
