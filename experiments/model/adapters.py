"""Low-rank parameterisations of the block matrices: LoRA, ReLoRA, W = A B.

Parameters with adapters are {"model": a LLaMA's, "adapters": {path: {"down", "up"}}}.
A block matrix W (L, n, m) then counts as W + down up, with down (L, n, r) and up (L, r,
m). Functions of a LLaMA's parameters get :func:`merged` parameters.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.model.groups import parameter_groups

Kind = Literal["lora", "relora", "low_rank"]


def with_adapters(params: Any, kind: Kind, rank: int, key: jax.Array) -> Any:
    """Returns parameters with adapters at their start.

    For LoRA and ReLoRA, down is normal with standard deviation 1 / sqrt(n), up is zero,
    and W is frozen. For "low_rank", down up is the best approximation of W and replaces
    W.

    Args:
        params: Parameters of a LLaMA.
        kind: The parameterisation.
        rank: r, at least 1 and below the sides of every block matrix.
        key: Key for the draws of down.
    """
    adapters, model = {}, {}
    leaves = _blocks(params)
    for (name, leaf), own_key in zip(
        leaves.items(), jax.random.split(key, len(leaves)), strict=True
    ):
        if kind == "low_rank":
            u, s, v = jnp.linalg.svd(leaf.astype(jnp.float32), full_matrices=False)
            root = jnp.sqrt(s[:, None, :rank])
            down = u[..., :rank] * root
            up = v[:, :rank, :] * jnp.swapaxes(root, -1, -2)
            model[name] = optax.MaskedNode()
        else:
            down, up = _fresh(leaf, rank, own_key)
            model[name] = leaf
        adapters[name] = {
            "down": down.astype(leaf.dtype),
            "up": up.astype(leaf.dtype),
        }
    return {"model": _replaced(params, model), "adapters": adapters}


def has_adapters(params: Any) -> bool:
    """Returns whether parameters have the adapters of :func:`with_adapters`."""
    return isinstance(params, dict) and params.keys() == {"model", "adapters"}


def merged(params: Any) -> Any:
    """Returns a LLaMA's parameters, with adapters merged into the block matrices.

    Gradients go to the adapters, and to parameters without adapters.
    """
    if not has_adapters(params):
        return params
    adapters = params["adapters"]

    def matrix(path, leaf):
        name = _name(path)
        if name not in adapters:
            return leaf
        product = adapters[name]["down"] @ adapters[name]["up"]
        if isinstance(leaf, optax.MaskedNode):
            return product
        return jax.lax.stop_gradient(leaf) + product

    return jax.tree_util.tree_map_with_path(
        matrix, params["model"], is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def restarted(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any]:
    """Merges adapters into the block matrices, and restarts the adapters: ReLoRA.

    Args:
        params: Parameters with adapters.
        opt_state: State of the optimizer; the moments of adapters become zero.
        key: Key for the draws of the new adapters.
    """
    model = merged(params)
    rank = next(iter(params["adapters"].values()))["up"].shape[-2]

    def forgotten(path, leaf):
        names = {str(getattr(entry, "key", "")) for entry in path}
        return jnp.zeros_like(leaf) if "adapters" in names else leaf

    opt_state = jax.tree_util.tree_map_with_path(forgotten, opt_state)
    return with_adapters(model, "relora", rank, key), opt_state


def _blocks(params: Any) -> dict[str, jax.Array]:
    """Returns the block matrices by their paths."""
    groups = jax.tree.leaves(parameter_groups(params))
    leaves = zip(jax.tree.leaves_with_path(params), groups, strict=True)
    return {_name(path): leaf for (path, leaf), group in leaves if group == "blocks"}


def _fresh(leaf: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    layers, n, m = leaf.shape
    down = jax.random.normal(key, (layers, n, rank)) / n**0.5
    return down, jnp.zeros((layers, rank, m))


def _replaced(params: Any, new: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(_name(path), leaf), params
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
