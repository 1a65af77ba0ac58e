"""Low-rank parameterisations of the block matrices: LoRA, ReLoRA, W = A B.

Parameters with adapters are {"model": a model's, "adapters": {path: {"down", "up"}}}.
A block matrix W (*stack, n, m) then counts as W + scale down up, with down (*stack, n,
r) and up (*stack, r, m). Functions of a model's parameters get :func:`adapted`
parameters while it is trained, and :func:`merged` ones where it is written. Block
matrices are those of group "blocks", :func:`experiments.model.groups.parameter_groups`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.errors import UserError
from experiments.model.groups import parameter_groups
from experiments.model.layers import together
from experiments.model.linear import Adapted

Kind = Literal["lora", "relora", "low_rank"]
Draw = Literal["normal", "uniform"]


def with_adapters(
    params: Any, kind: Kind, rank: int, key: jax.Array, draw: Draw = "normal"
) -> Any:
    """Returns parameters with adapters at their start.

    For LoRA and ReLoRA, down is drawn, up is zero, both are float32 as PEFT's, and W is
    frozen. For "low_rank", down up is the best approximation of W and replaces W, in
    W's dtype.

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
            down, up = down.astype(leaf.dtype), up.astype(leaf.dtype)
        else:
            down, up = _fresh(leaf, rank, own_key, draw)
            model[name] = leaf
        adapters[name] = {"down": down, "up": up}
    return {"model": _replaced(params, model), "adapters": adapters}


def has_adapters(params: Any) -> bool:
    """Returns whether parameters have the adapters of :func:`with_adapters`."""
    return isinstance(params, dict) and params.keys() == {"model", "adapters"}


def adapted(params: Any) -> Any:
    """Returns a model's parameters, each matrix with its adapter: what is trained on.

    Where W is not float32, or the rank is small, the two stay apart: x W + (x down) up.
    A sum in bfloat16 would lose an adapter's first steps, and the gradient of a sum is
    a full matrix. Otherwise W + down up takes fewer operations for a batch.

    Args:
        params: Parameters, with adapters or without.
    """

    def matrix(leaf, down, up):
        is_there = not isinstance(leaf, optax.MaskedNode)
        if is_there and _has_own_product(leaf, up.shape[-2]):
            return Adapted(leaf, down, up)
        return _merged_matrix(leaf, down, up, 1.0)

    return _with_matrices(params, matrix) if has_adapters(params) else params


def merged(params: Any, scale: float = 1.0) -> Any:
    """Returns a model's parameters as they are written: in stacks, without adapters.

    Adapters are merged into the block matrices, in the dtype of W. Gradients go to the
    adapters, and to parameters without adapters.

    Args:
        params: Parameters, with adapters or without.
        scale: Factor of down up: alpha / r of an adapter of PEFT, 1 in those made here.
    """
    if not has_adapters(params):
        return together(params)
    return _with_matrices(
        params, lambda leaf, down, up: _merged_matrix(leaf, down, up, scale)
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


def _with_matrices(params: Any, matrix: Callable[..., Any]) -> Any:
    """Returns a model's parameters, those with adapters as ``matrix`` says."""
    adapters = params["adapters"]

    def per_leaf(path, leaf):
        pair = adapters.get(_name(path))
        return leaf if pair is None else matrix(leaf, **pair)

    return jax.tree_util.tree_map_with_path(
        per_leaf, params["model"], is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def _merged_matrix(leaf: Any, down: jax.Array, up: jax.Array, scale: float) -> Any:
    product = down @ up
    if scale != 1:
        product = scale * product
    if isinstance(leaf, optax.MaskedNode):
        return product
    return (jax.lax.stop_gradient(leaf) + product).astype(leaf.dtype)


def _has_own_product(leaf: jax.Array, rank: int) -> bool:
    """Returns whether x W + (x down) up takes fewer operations, or W is narrow.

    A token takes 2 r (n + m) operations of the second product and twice these of its
    gradients; 2 n m of the gradient of a sum.
    """
    n, m = leaf.shape[-2:]
    return leaf.dtype != jnp.float32 or 3 * rank * (n + m) < n * m


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
