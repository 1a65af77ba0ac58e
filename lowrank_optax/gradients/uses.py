"""The rules of operations on followed arrays in a traced program.

Moves of axes, pieces and sums give followed arrays again. Products and lookups get
reverse rules for the projected gradient. Any other operation raises an error with its
name: a gradient is never silently wrong or missing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.equations import bound
from lowrank_optax.gradients.followed import Followed, Refused, Term
from lowrank_optax.gradients.linear import added, negated, scaled
from lowrank_optax.gradients.lookups import picked
from lowrank_optax.gradients.moves import broadcast, reshaped, transposed
from lowrank_optax.gradients.pieces import (
    concatenated,
    padded_by,
    sliced,
    sliced_from,
    split,
    stacked_up,
    turned,
    unstacked,
)
from lowrank_optax.gradients.product import dot_general
from lowrank_optax.gradients.ragged import ragged_dot


def _kept(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """An operation that leaves entries in place: a cast, a copy, a sharding."""
    values = [x.value if isinstance(x, Followed) else x for x in inputs]
    pairs = list(zip(inputs, bound(equation, values), strict=True))
    if any(jnp.iscomplexobj(y) for _, y in pairs):
        raise Refused("cast to complex numbers")
    return [x.of(y) if isinstance(x, Followed) else y for x, y in pairs]


def _resharded(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """A new sharding. On a new kind of mesh coordinates and bases are resharded too."""
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    before, mesh = (jax.typeof(y).sharding.mesh for y in (x.value, value))
    if before == mesh:
        return [x.of(value)]

    def moved(array):
        sharding = NamedSharding(mesh, PartitionSpec(*(None,) * array.ndim))
        return jax.sharding.reshard(array, sharding)

    return [x.changed(moved, x.dims).of(value)]


def _varying(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """A cast to varying: coordinates and bases are cast with the array."""
    (x,) = inputs
    if equation.params.get("to", "varying") != "varying":
        raise Refused("to another type")

    def each(array):
        return bound(equation, [array])[0]

    terms = tuple(Term(*map(each, term)) for term in x.terms)
    return [dataclasses.replace(x, value=each(x.value), terms=terms)]


def _transposed(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    return [transposed(x, equation.params["permutation"]).of(value)]


def _reshaped(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    return [reshaped(x, value.shape).of(value)]


def _broadcast(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    places = equation.params["broadcast_dimensions"]
    return [broadcast(x, value.shape, places).of(value)]


def _own_rule(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    raise Refused("whose derivative rule is its own and needs the full gradient")


USES: dict[str, Callable[[core.JaxprEqn, Sequence[Any]], list[Any]]] = {
    "convert_element_type": _kept,
    "copy": _kept,
    "copy_p": _kept,
    "sharding_constraint": _kept,
    "mesh_cast": _resharded,
    "reshard": _resharded,
    "layout_constraint": _kept,
    "name": _kept,
    "reduce_precision": _kept,
    "optimization_barrier": _kept,
    "pvary": _varying,
    "pcast": _varying,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _broadcast,
    "slice": sliced,
    "dynamic_slice": sliced_from,
    "split": split,
    "unstack": unstacked,
    "rev": turned,
    "pad": padded_by,
    "concatenate": concatenated,
    "stack": stacked_up,
    "neg": negated,
    "add": added,
    "add_any": added,
    "sub": added,
    "mul": scaled,
    "div": scaled,
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "gather": picked,
    "custom_jvp_call": _own_rule,
    "custom_vjp_call": _own_rule,
    "custom_vjp_call_jaxpr": _own_rule,
}
