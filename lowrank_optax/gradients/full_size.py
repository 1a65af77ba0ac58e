"""A followed array used as a plain array: its full gradient is projected at once.

The backward pass forms one array of full size. For looked-up rows and for sums with
activations, this array is a gradient of activations. For a norm of a parameter, or a
penalty, such an array is needed anyway: d sum(W^2) / dW = 2 W, and 2 W P is kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from lowrank_optax.equations import bound
from lowrank_optax.gradients.contraction import contract
from lowrank_optax.gradients.followed import (
    Entries,
    Followed,
    Refused,
    Term,
    TypeOf,
    names_of,
    without_ones,
)
from lowrank_optax.gradients.routes import RANK
from lowrank_optax.matrix.sharding import with_automatic_axes

_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])
_NAMES = """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div
    erf erf_inv erfc exp exp2 expm1 floor integer_pow log log1p logistic max min mul neg
    pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh
"""
_ELEMENTWISE = frozenset(_NAMES.split())
# Operations that move entries without changing them.
_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "reshape",
        "squeeze",
        "transpose",
    ]
)


def entry_by_entry(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the results of an operation on entries of parameters.

    Later operations must reduce the entries: a product would form a full gradient.

    Raises:
        Refused: If the operation is neither elementwise nor a reduction.
    """
    name = equation.primitive.name
    entries = [x for x in inputs if isinstance(x, Entries)]
    if name not in _ELEMENTWISE | _REDUCTIONS | (_MOVES if entries else frozenset()):
        raise Refused
    results = bound(equation, [plain(x) for x in inputs])
    if name in _REDUCTIONS:
        return results
    first = entries[0].first if entries else name
    return [Entries(result, names_of(inputs), first) for result in results]


def plain(x: Any) -> Any:
    """Returns the plain array; the backward pass projects its full gradient."""
    if isinstance(x, Entries):
        return x.value
    return _plain(x) if isinstance(x, Followed) else x


@jax.custom_vjp
def _plain(x: Followed) -> jax.Array:
    return x.value


def _forward(primal):
    x = jax.tree.map(lambda leaf: leaf.value, primal)
    terms = [
        (TypeOf.array(term.coordinates), term.basis)
        if flags.coordinates.perturbed
        else None
        for term, flags in zip(x.terms, primal.terms, strict=True)
    ]
    return x.value, (x.without_arrays(), terms)


def _backward(saved, dy):
    x, terms = saved
    if isinstance(dy, SymbolicZero):
        return (None,)
    gradients = tuple(Term(term and _coordinates(x, dy, *term), None) for term in terms)
    return (dataclasses.replace(x, terms=gradients),)


def _coordinates(x: Followed, dy: jax.Array, type_: TypeOf, basis: jax.Array):
    """Returns the gradient of a term's coordinates, from sums in float32 or wider."""

    def gradient(dy, basis):
        labels = [
            (*(i for i, size in enumerate(shape[:-1]) if size > 1), RANK)
            for shape in (basis.shape, type_.like.shape)
        ]
        found = contract(
            dy.reshape(x.atoms),
            range(len(x.atoms)),
            without_ones(basis),
            *labels,
            dtype=jnp.promote_types(dy.dtype, jnp.float32),
        )
        return type_.shaped(found)

    return with_automatic_axes(gradient, type_.like, dy, basis)


_plain.defvjp(_forward, _backward, symbolic_zeros=True)
