"""Followed arrays cut into pieces, and joined from pieces."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lowrank_optax.equations import bound
from lowrank_optax.gradients.followed import (
    Followed,
    Refused,
    names_of,
    plain_term,
    value_of,
)
from lowrank_optax.gradients.moves import (
    along,
    broadcast,
    cut,
    padded,
    reshaped,
    stacked,
)


def sliced(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``slice``."""
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    starts, strides = (equation.params[k] for k in ("start_indices", "strides"))
    for dim, size in enumerate(value.shape):
        stride = strides[dim] if strides else 1
        if (size, stride) != (x.value.shape[dim], 1):
            x = cut(x, dim, starts[dim], size, stride)
    return [x.of(value)]


def sliced_from(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``dynamic_slice``."""
    x, *starts = inputs
    if not isinstance(x, Followed):
        raise Refused("as an index")
    (value,) = bound(equation, [x.value, *starts])
    for dim, (start, size) in enumerate(zip(starts, value.shape, strict=True)):
        if size == x.value.shape[dim]:
            continue

        def piece(array, axis, start=start, size=size):
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

        x = along(x, dim, size, piece)
    return [x.of(value)]


def split(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``split``."""
    (x,) = inputs
    found, start = [], 0
    for value in bound(equation, [x.value]):
        size = value.shape[equation.params["axis"]]
        found.append(cut(x, equation.params["axis"], start, size).of(value))
        start += size
    return found


def unstacked(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``unstack``."""
    (x,) = inputs
    axis = equation.params["axis"]
    return [
        reshaped(cut(x, axis, i, 1), value.shape).of(value)
        for i, value in enumerate(bound(equation, [x.value]))
    ]


def turned(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``rev``."""
    (x,) = inputs
    (value,) = bound(equation, [x.value])
    for dim in equation.params["dimensions"]:
        x = along(x, dim, value.shape[dim], jnp.flip)
    return [x.of(value)]


def padded_by(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``pad``; the padding value gets a term of its own."""
    x, filling = inputs
    if not isinstance(x, Followed):
        raise Refused("as a padding value")
    (value,) = bound(equation, [x.value, filling])
    inside = jnp.zeros(x.value.shape, bool)
    for dim, sizes in enumerate(equation.params["padding_config"]):
        if tuple(sizes) != (0, 0, 0):
            x = padded(x, dim, *map(int, sizes))
    (is_around,) = bound(equation, [inside, jnp.array(True)])
    around = jnp.where(is_around, filling, 0).astype(value.dtype)
    terms = (*x.terms, plain_term(around, x.dims))
    return [dataclasses.replace(x, value=value, terms=terms)]


def concatenated(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``concatenate``."""
    (value,) = bound(equation, [value_of(x) for x in inputs])
    return [_together(inputs, equation.params["dimension"], value)]


def stacked_up(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``stack``: each piece along a dimension of its own."""
    (value,) = bound(equation, [value_of(x) for x in inputs])
    axis = equation.params["axis"]
    shape = [*value.shape]
    shape[axis] = 1
    places = [i for i in range(value.ndim) if i != axis]
    pieces = [
        broadcast(x, shape, places)
        if isinstance(x, Followed)
        else jnp.expand_dims(x, axis)
        for x in inputs
    ]
    return [_together(pieces, axis, value)]


def _together(pieces: Sequence[Any], dim: int, value: jax.Array) -> Followed:
    """Returns pieces side by side: stacked if alike, else padded with zeros."""
    like = next(x for x in pieces if isinstance(x, Followed))
    names = names_of(pieces)
    is_sum = any(x.is_sum for x in pieces if isinstance(x, Followed))
    kinds = {_kind(x) for x in pieces}
    if len(kinds) == 1 and len(pieces) > 1:
        found = stacked(pieces, dim)
        return dataclasses.replace(found, value=value, names=names, is_sum=is_sum)
    apart, start = [], 0
    for piece in pieces:
        x = piece if isinstance(piece, Followed) else _of_array(piece, like, dim)
        size = math.prod(x.dims[dim])
        apart.append(padded(x, dim, start, value.shape[dim] - start - size))
        start += size
    dims = apart[0].dims
    if any(x.dims != dims for x in apart):
        raise Refused("with another parameter whose axes were merged otherwise")
    terms = tuple(term for x in apart for term in x.terms)
    return Followed(value, terms, dims, names, is_sum)


def _of_array(array: jax.Array, like: Followed, dim: int) -> Followed:
    """Returns an array as a piece like another piece, except along one dimension."""
    size = array.shape[dim]
    dims = (*like.dims[:dim], (size,) if size > 1 else (), *like.dims[dim + 1 :])
    return Followed(array, (plain_term(array, dims),), dims, ())


def _kind(x: Any):
    """Returns the structure of a piece. Only pieces of one structure are stacked."""
    if not isinstance(x, Followed):
        return object()
    return x.dims, tuple(tuple((y.shape, y.dtype) for y in term) for term in x.terms)
