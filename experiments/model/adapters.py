"""Low-rank parameterisations of the block matrices: LoRA, ReLoRA, W = A B.

Parameters with adapters are {"model": a model's, "adapters": {path: {"down", "up"}}}.
A block matrix W (*stack, n, m) then counts as W + scale down up, with down (*stack, n,
r) and up (*stack, r, m). Functions of a model's parameters get :func:`merged`
parameters. Block matrices are those of group "blocks",
:func:`experiments.model.groups.parameter_groups`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.errors import UserError
from experiments.model.groups import parameter_groups

Kind = Literal["lora", "relora", "low_rank"]
Draw = Literal["normal", "uniform"]


def with_adapters(
    params: Any, kind: Kind, rank: int, key: jax.Array, draw: Draw = "normal"
) -> Any:
    """Returns parameters with adapters at their start.

    For LoRA and ReLoRA, down is drawn, up is zero, and W is frozen. For "low_rank",
    down up is the best approximation of W and replaces W.

    Args:
        params: Parameters of a LLaMA or of an encoder.
        kind: The parameterisation.
        rank: r, from 1 to the shorter side of every block matrix.
        key: Key for the draws of down.
        draw: "normal" has standard deviation 1 / sqrt(n). "uniform" is PEFT's, on
            (-1 / sqrt(n), 1 / sqrt(n)): Kaiming's with a = sqrt(5).

    Raises:
        UserError: If the rank is out of its range.
    """
    check_adapter_rank(params, rank)
    adapters, model = {}, {}
    leaves = block_matrices(params)
    for (name, leaf), own_key in zip(
        leaves.items(), jax.random.split(key, len(leaves)), strict=True
    ):
        if kind == "low_rank":
            u, s, v = jnp.linalg.svd(leaf.astype(jnp.float32), full_matrices=False)
            root = jnp.sqrt(s[..., None, :rank])
            down = u[..., :rank] * root
            up = v[..., :rank, :] * jnp.swapaxes(root, -1, -2)
            model[name] = optax.MaskedNode()
        else:
            down, up = _fresh(leaf, rank, own_key, draw)
            model[name] = leaf
        adapters[name] = {
            "down": down.astype(leaf.dtype),
            "up": up.astype(leaf.dtype),
        }
    return {"model": _replaced(params, model), "adapters": adapters}


def has_adapters(params: Any) -> bool:
    """Returns whether parameters have the adapters of :func:`with_adapters`."""
    return isinstance(params, dict) and params.keys() == {"model", "adapters"}


def merged(params: Any, scale: float = 1.0) -> Any:
    """Returns a model's parameters, with adapters merged into the block matrices.

    Gradients go to the adapters, and to parameters without adapters.

    Args:
        params: Parameters, with adapters or without.
        scale: Factor of down up. PEFT's alpha / r in fine-tuning, 1 in pre-training.
    """
    if not has_adapters(params):
        return params
    adapters = params["adapters"]

    def matrix(path, leaf):
        name = _name(path)
        if name not in adapters:
            return leaf
        product = adapters[name]["down"] @ adapters[name]["up"]
        if scale != 1:
            product = scale * product
        if isinstance(leaf, optax.MaskedNode):
            return product
        return (jax.lax.stop_gradient(leaf) + product).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(
        matrix, params["model"], is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def restarted(
    params: Any,
    opt_state: Any,
    key: jax.Array,
    scale: float = 1.0,
    draw: Draw = "normal",
) -> tuple[Any, Any]:
    """Merges adapters into the block matrices, and restarts the adapters: ReLoRA.

    Args:
        params: Parameters with adapters.
        opt_state: State of the optimizer; the moments of adapters become zero.
        key: Key for the draws of the new adapters.
        scale: See :func:`merged`.
        draw: See :func:`with_adapters`.
    """
    model = merged(params, scale)
    rank = next(iter(params["adapters"].values()))["up"].shape[-2]

    def forgotten(path, leaf):
        names = {str(getattr(entry, "key", "")) for entry in path}
        return jnp.zeros_like(leaf) if "adapters" in names else leaf

    opt_state = jax.tree_util.tree_map_with_path(forgotten, opt_state)
    return with_adapters(model, "relora", rank, key, draw), opt_state


def check_adapter_rank(params: Any, rank: int) -> None:
    """Checks that every block matrix can have an adapter of a rank.

    Raises:
        UserError: If the rank is below 1 or above the shorter side of a matrix.
    """
    blocks = block_matrices(params)
    name = min(blocks, key=lambda name: min(blocks[name].shape[-2:]))
    n, m = blocks[name].shape[-2:]
    if not 1 <= rank <= min(n, m):
        raise UserError(
            f"adapters: rank {rank} does not fit {name} ({n} x {m}); "
            f"give a rank from 1 to {min(n, m)}"
        )


def block_matrices(params: Any) -> dict[str, jax.Array]:
    """Returns the block matrices, (*stack, n, m) each, by their paths in the model."""
    params = params["model"] if has_adapters(params) else params
    groups = jax.tree.leaves(parameter_groups(params))
    leaves = zip(jax.tree.leaves_with_path(params), groups, strict=True)
    return {_name(path): leaf for (path, leaf), group in leaves if group == "blocks"}


def _fresh(
    leaf: jax.Array, rank: int, key: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array]:
    *stack, n, m = leaf.shape
    drawn = jax.random.normal if draw == "normal" else _uniform
    return drawn(key, (*stack, n, rank)) / n**0.5, jnp.zeros((*stack, rank, m))


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1, maxval=1)


def _replaced(params: Any, new: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(_name(path), leaf), params
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
