"""Linear operations on followed arrays: sums, and products with a number or vector."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from lowrank_optax.equations import bound
from lowrank_optax.gradients.followed import (
    Followed,
    Refused,
    Term,
    atomic,
    names_of,
    plain_term,
    value_of,
    varies,
)
from lowrank_optax.gradients.moves import broadcast_to


def _bound(equation: core.JaxprEqn, inputs: Sequence[Any]) -> jax.Array:
    return bound(equation, [value_of(x) for x in inputs])[0]


def negated(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``neg``."""
    (x,) = inputs
    value = _bound(equation, inputs)
    return [_minus(x).of(value)]


def _minus(x: Followed) -> Followed:
    terms = tuple(Term(-term.coordinates, term.basis) for term in x.terms)
    return dataclasses.replace(x, terms=terms)


def added(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``add`` and ``sub``: the terms of both operands.

    A plain array becomes a term, and the term's gradient has the array's own size.
    Constants are never traced and need no term.
    """
    value = _bound(equation, inputs)
    first, second = inputs
    if equation.primitive.name == "sub":
        second = _minus(second) if isinstance(second, Followed) else -second
    pair = [_of_shape(x, value) for x in (first, second)]
    followed = [x for x in pair if isinstance(x, Followed)]
    dims = followed[0].dims
    if any(x.dims != dims for x in followed):
        raise Refused("with another parameter whose axes were merged otherwise")
    terms = []
    for x, given in zip(pair, inputs, strict=True):
        if isinstance(x, Followed):
            terms += x.terms
        elif isinstance(given, Tracer):
            terms.append(plain_term(x, dims))
    # A parameter plus a number or a bias is still a parameter.
    is_sum = any(
        x.is_sum if isinstance(x, Followed) else x.size == value.size for x in pair
    )
    return [Followed(value, tuple(terms), dims, names_of(pair), is_sum)]


def scaled(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``mul`` and ``div`` by a number, or a vector along one side.

    d(s W) = s dW + W ds, so s gets a term too, with W as its basis. The gradient <G, W>
    of s does not need G.
    """
    is_division = equation.primitive.name == "div"
    first, second = inputs
    swap = not isinstance(first, Followed)
    x, s = (second, first) if swap else (first, second)
    if isinstance(s, Followed) or (is_division and swap):
        raise Refused("by another parameter")
    value = _bound(equation, inputs)
    is_constant = not isinstance(s, Tracer)
    x, s = _of_shape(x, value), _of_shape(s, value)
    number = atomic(s, x.dims)
    factor = 1 / number if is_division else number
    terms = [_scaled(x, term, factor) for term in x.terms]
    if not is_constant:
        # For a quotient q = W / s, dq = dW / s - q ds / s.
        basis = -value / s if is_division else x.value
        basis = jnp.broadcast_to(basis, value.shape)
        terms.append(Term(number, atomic(basis, x.dims)))
    return [dataclasses.replace(x, value=value, terms=tuple(terms))]


def _scaled(x: Followed, term: Term, factor: jax.Array) -> Term:
    """Returns a term times a factor. Another term has the factor's gradient."""
    factor = jax.lax.stop_gradient(factor)
    coordinates, basis = term
    places = zip(*map(varies, (factor, coordinates, basis)), strict=True)
    if all(not f or c or not b for f, c, b in places):
        changed = coordinates * factor
        return term._replace(coordinates=changed.astype(coordinates.dtype))
    # A basis may vary over the blocks of granularity, not over the whole other side.
    shape = jnp.broadcast_shapes(basis.shape, factor.shape)
    if basis.shape != shape and math.prod(shape) > x.value.size:
        raise Refused("by an array that varies along both sides of its matrix")
    return term._replace(basis=(basis * factor).astype(basis.dtype))


def _of_shape(x: Any, value: jax.Array) -> Any:
    """Returns a followed or plain operand with as many dimensions as the result."""
    if isinstance(x, Followed):
        return broadcast_to(x, value.shape)
    return jnp.reshape(x, (1,) * value.ndim) if jnp.ndim(x) == 0 else x
