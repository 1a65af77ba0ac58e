"""Where arrays lie: on a mesh or not, as those of another run, as the state has to."""

import contextlib
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_optax import state_shardings


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Returns a context in which arrays are on a mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def placed_like(tree: Any, like: Any) -> Any:
    """Returns a tree with each array on the devices where that of another one is."""

    def placed(x, like):
        return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x

    return jax.tree.map(placed, tree, like)


def begun(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh | None
) -> tuple[Any, Any]:
    """Returns parameters and their state, cut over the mesh if there is one."""
    if mesh is None:
        return params, optimizer.init(params)
    params = sharded(params, mesh)
    shardings = state_shardings(optimizer, params)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return params, state


def sharded(params: Any, mesh: Mesh) -> Any:
    """Returns arrays cut on their last two axes, as far as the mesh divides them."""

    def put(x):
        spec = [None] * (x.ndim - 2) + ["fsdp", "tp"] if x.ndim > 1 else []
        spec = [
            name if name and n % mesh.shape[name] == 0 else None
            for n, name in zip(x.shape, spec, strict=False)
        ]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, params)
