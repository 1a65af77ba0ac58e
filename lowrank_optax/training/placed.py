"""Where the arrays of a training loop are between its steps."""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding


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
