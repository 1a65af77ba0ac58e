"""Arrays onto the mesh, and back to the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from experiments.distribution.mesh import rows, whole
from experiments.distribution.rules import dividing

Batch = Mapping[str, Any]


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree with a whole copy of each leaf on each device."""
    return jax.device_put(tree, whole(mesh))


def place_like(tree: Any, old: Any, mesh: Mesh) -> Any:
    """Returns the tree with each leaf where the old tree has the one of its path.

    Args:
        tree: Arrays.
        old: Arrays, which may have other lengths. An axis whose new length its cut does
            not divide becomes whole.
        mesh: Where leaves lie that the old tree has not: each device has them whole.
    """
    known = {path: x.sharding for path, x in jax.tree.leaves_with_path(old)}
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, x: dividing(x, known.get(path, whole(mesh))), tree
    )
    return jax.device_put(tree, shardings)


def initial_state(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Returns the optimizer's state of step 0.

    Args:
        tx: The optimizer.
        params: Parameters on the mesh.
        shardings: A tree like the state, or one sharding for all of its arrays.
    """
    # Compiled as one program: eagerly, each of its hundreds of arrays is one.
    return jax.jit(tx.init, out_shardings=shardings)(params)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Returns the batch on the devices, each having its share of the sequences.

    Args:
        batch: Arrays of the host, whole in shape. A process may leave out the
            sequences that its devices have no share of: see :func:`own_rows`.
        mesh: The devices.
    """
    sharding = rows(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)
    return {name: _from_host(np.asarray(x), sharding) for name, x in batch.items()}


def _from_host(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


def own_rows(mesh: Mesh, batch_size: int) -> frozenset[int]:
    """Returns which sequences of a batch the devices of this process have."""
    places = rows(mesh).addressable_devices_indices_map((batch_size,))
    indices = (index[0] for index in places.values() if index is not None)
    return frozenset(i for part in indices for i in range(batch_size)[part])


def on_host(tree: Any) -> Any:
    """Returns arrays of NumPy, whole; all processes call it.

    What other processes have is gathered leaf by leaf.
    """

    def of_leaf(array):
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(of_leaf, tree)
