"""Layers in one stack, which is scanned, or apart, each with arrays of its own.

Layers in a stack compile once. Apart, each matrix has a state of its own, so that a
rank rule frees columns of one layer that another one needs. Files, tables and decoding
know stacks alone; :func:`together` makes them.

    {"blocks": {"attention": {"query": (L, d, d)}}}            # in a stack
    {"blocks": {"0": {"attention": {"query": (d, d)}}, ...}}   # apart
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_LAYER = re.compile(r"(^|/)blocks/(\d+)/")


class Layers(nnx.Module):
    """Modules of one kind, by their numbers."""

    def __init__(self, layers: list[nnx.Module]):
        self.count = len(layers)
        for number, layer in enumerate(layers):
            setattr(self, str(number), layer)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, str(number)) for number in range(self.count))


def create_layers(
    create: Callable[[nnx.Rngs], nnx.Module],
    count: int,
    rngs: nnx.Rngs,
    *,
    scanned: bool,
) -> Any:
    """Returns modules in a stack, on axis 0 of each array, or apart.

    Args:
        create: Makes one.
        count: L.
        rngs: Of the parameters; they differ between a stack and layers apart.
        scanned: Whether they are in a stack.
    """
    if not scanned:
        return Layers([create(rngs) for _ in range(count)])
    stack = nnx.vmap(create, in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=count)(stack)(rngs)


def run_layers(
    call: Callable[..., jax.Array],
    x: jax.Array,
    layers: Any,
    shared: Any,
    each: Any,
    *,
    policy: Any,
) -> jax.Array:
    """Returns what the last of several layers returns.

    Args:
        call: (x, layer, shared, own) -> x.
        x: What the first one reads.
        layers: Of :func:`create_layers`.
        shared: What all layers get.
        each: A tree with what each layer gets, on axis 0.
        policy: What is kept for the backward pass, as of :func:`jax.checkpoint`.
    """
    if isinstance(layers, Layers):
        one = nnx.remat(call, policy=policy)
        for number, layer in enumerate(layers):
            x = one(x, layer, shared, jax.tree.map(lambda own, i=number: own[i], each))
        return x
    # The loop keeps XLA from merging the recomputation into the forward pass.
    one = nnx.remat(call, policy=policy, prevent_cse=False)
    scan = nnx.scan(one, in_axes=(nnx.Carry, 0, None, 0), out_axes=nnx.Carry)
    return scan(x, layers, shared, each)


def are_apart(params: Any) -> bool:
    """Returns whether the layers of a model's parameters are apart."""
    return "0" in params["blocks"]


def apart(params: Any) -> Any:
    """Returns a model's parameters with the layers of their stacks apart."""
    count = len(jax.tree.leaves(params["blocks"])[0])
    layers = {
        str(number): jax.tree.map(lambda x, i=number: x[i], params["blocks"])
        for number in range(count)
    }
    return {**params, "blocks": layers}


def together(params: Any) -> Any:
    """Returns a model's parameters with their layers in stacks; what is so stays."""
    if not are_apart(params):
        return params
    blocks = params["blocks"]
    layers = [blocks[str(number)] for number in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def by_kind(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what each layer has as a list for each kind of matrix, as a stack has it.

    Args:
        named: By the names of the leaves, such as blocks/3/mlp/up.

    Example:
        >>> by_kind({"blocks/0/up": 7, "blocks/10/up": 9, "blocks/2/up": 8, "norm": 1})
        {'blocks/up': [7, 8, 9], 'norm': 1}
    """
    found: dict[str, Any] = {}
    for name, value in named.items():
        layer = _LAYER.search(name)
        if layer is None:
            found[name] = value
        else:
            kind = _LAYER.sub(r"\1blocks/", name)
            found.setdefault(kind, {})[int(layer[2])] = value
    return {
        name: [value[i] for i in sorted(value)] if isinstance(value, dict) else value
        for name, value in found.items()
    }
