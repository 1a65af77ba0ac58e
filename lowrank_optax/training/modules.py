"""Modules of Flax NNX, taken apart for a step and put together again."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.arrays import leaf_name


class Model(NamedTuple):
    """A model as a step takes it.

    Attributes:
        params: The parameters: what the optimizer changes.
        carried: Other arrays of a module, such as statistics and counters of random
            draws; () for a tree of parameters.
        graph: Static part of a module; None for a tree of parameters.
    """

    params: Any
    carried: Any
    graph: Any


def taken_apart(model: Any) -> Model:
    """Returns a module's parameters apart from the rest, or a tree as it is."""
    if not _is_module(model):
        return Model(model, (), None)
    nnx = sys.modules["flax.nnx"]
    graph, params, carried = nnx.split(model, nnx.Param, ...)
    return Model(params, carried, graph)


def put_together(model: Any, params: Any, carried: Any) -> Any:
    """Returns the module with new arrays, changed in place, or the new tree."""
    if not _is_module(model):
        return params
    sys.modules["flax.nnx"].update(model, params, carried)
    return model


def loss_of(function: Any, has_aux: bool, graph: Any) -> Callable[..., Any]:
    """Returns a loss function as a step calls it.

    The result is (params, carried, batch, *args) -> loss, (carried, aux).

    Args:
        function: (model, batch, *args) -> scalar, or (scalar, aux).
        has_aux: Whether the function returns aux too.
        graph: Of the model.
    """

    def loss(params, carried, *args):
        found, carried = _called(function, graph, params, carried, *args)
        if has_aux and not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                "loss_fn must return (scalar, aux), as has_aux=True says, not "
                f"{type(found).__name__}."
            )
        value, aux = found if has_aux else (found, None)
        if isinstance(value, (int, float)):
            value = jnp.asarray(value, float)
        shape = getattr(value, "shape", ())
        if shape != ():
            raise TypeError(f"loss_fn must return a scalar, not shape {shape}.")
        return value, (carried, aux)

    return loss


def check_same_variables(carried: Any, behind: Any) -> None:
    """Checks that a loss leaves a module the variables that it had.

    Args:
        carried: What the module carries before a micro-batch.
        behind: The same, or its shapes, behind it.

    Raises:
        ValueError: If the loss adds or removes variables.
    """
    if jax.tree.structure(behind) != jax.tree.structure(carried):
        names = [
            {leaf_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
            for tree in (carried, behind)
        ]
        changed = ", ".join(sorted(names[0] ^ names[1])) or "their kinds"
        raise ValueError(
            f"loss_fn changes the variables of the module ({changed}), and micro-"
            "batches need them to stay; call the module once before init, or leave "
            "out micro_batches."
        )


def _called(
    function: Any, graph: Any, params: Any, carried: Any, *args: Any
) -> tuple[Any, Any]:
    """Returns function(model, *args), and what the model carries behind the call."""
    if graph is None:
        return function(params, *args), carried
    nnx = sys.modules["flax.nnx"]
    # Variables of this trace: those of another one may not be changed.
    module = nnx.merge(graph, params, carried, copy=True)
    result = function(module, *args)
    return result, nnx.split(module, nnx.Param, ...)[2]


def _is_module(model: Any) -> bool:
    # Whoever has such a module has imported Flax.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)
