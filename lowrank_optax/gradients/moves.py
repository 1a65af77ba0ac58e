"""Moves of a followed array's axes: the same moves of coordinates and bases.

Each function returns the array with its old value. The operation itself makes the new
value.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lowrank_optax.gradients.followed import (
    Followed,
    Refused,
    Term,
    positions,
    varies,
)


def transposed(x: Followed, order: Sequence[int]) -> Followed:
    """Returns the array with its dimensions in another order."""
    at = positions(x.dims)
    axes = [i for dim in order for i in at[dim]]
    dims = tuple(x.dims[dim] for dim in order)
    return x.changed(lambda array: array.transpose(*axes, len(axes)), dims)


def reshaped(x: Followed, shape: Sequence[int]) -> Followed:
    """Returns the array after a reshape: atoms are cut and joined.

    Raises:
        Refused: If a new dimension would need parts of two atoms of different kinds.
    """
    # Neighbouring atoms along which the same arrays vary are joined.
    alike = zip(*(varies(y) for term in x.terms for y in term), strict=True)
    left = [
        (math.prod(size for size, _ in group), kind)
        for kind, group in itertools.groupby(
            zip(x.atoms, alike, strict=True), key=lambda pair: pair[1]
        )
    ]
    dims = []
    for size in shape:
        dim = []
        while size > 1:
            if not left:
                raise Refused("across its axes")
            atom, kind = left.pop(0)
            taken = math.gcd(size, atom)
            if taken not in (size, atom):
                raise Refused("across its axes")
            dim.append((taken, kind))
            size //= taken
            if taken < atom:
                left.insert(0, (atom // taken, kind))
        dims.append(dim)
    atoms = [atom for dim in dims for atom in dim]
    terms = []
    for i in range(len(x.terms)):
        pair = (
            array.reshape(
                *(size if kind[2 * i + j] else 1 for size, kind in atoms),
                array.shape[-1],
            )
            for j, array in enumerate(x.terms[i])
        )
        terms.append(Term(*pair))
    sizes = tuple(tuple(size for size, _ in dim) for dim in dims)
    return dataclasses.replace(x, terms=tuple(terms), dims=sizes)


def broadcast(x: Followed, shape: Sequence[int], places: Sequence[int]) -> Followed:
    """Returns the array repeated along new dimensions, and along those of size 1.

    Args:
        x: The array.
        shape: Shape of the result.
        places: Position of each dimension of the array in the result, ascending.
    """
    sources = dict(zip(places, x.dims, strict=True))
    dims, new, count = [], [], 0
    for i, size in enumerate(shape):
        dim = sources.get(i, ())
        if not dim and size > 1:
            dim = (size,)
            new.append(count)
        dims.append(dim)
        count += len(dim)
    return x.changed(lambda array: jnp.expand_dims(array, new), tuple(dims))


def broadcast_to(x: Followed, shape: Sequence[int]) -> Followed:
    """Returns the array repeated along its dimensions of size 1."""
    return broadcast(x, shape, range(len(shape)))


def along(
    x: Followed, dim: int, size: int, change: Callable[[jax.Array, int], jax.Array]
) -> Followed:
    """Returns the array changed along one dimension: cut, picked from, turned.

    Args:
        x: The array.
        dim: The dimension, with a single atom or of size 1.
        size: Size of the dimension afterwards.
        change: (array, axis) -> array with this axis changed.

    Raises:
        Refused: If the dimension has several atoms.
    """
    if len(x.dims[dim]) > 1:
        raise Refused("cutting an axis that a reshape merged or granularity divides")
    if not x.dims[dim]:
        return x
    at = positions(x.dims)[dim].start

    def changed(array):
        array = change(array, at) if array.shape[at] > 1 else array
        return jnp.squeeze(array, at) if size == 1 else array

    return x.changed(changed, _with(x, dim, (size,) if size > 1 else ()))


def cut(x: Followed, dim: int, start: int, size: int, stride: int = 1) -> Followed:
    """Returns a piece along one dimension: ``size`` indices from ``start``."""
    inner = math.prod(x.dims[dim][1:])
    if inner > 1 and stride == 1 and start % inner == 0 and size % inner == 0:
        # Whole steps of the outermost atom, which becomes a dimension meanwhile.
        outer, *others = x.dims[dim]
        apart = (*x.dims[:dim], (outer,), tuple(others), *x.dims[dim + 1 :])
        found = cut(
            dataclasses.replace(x, dims=apart), dim, start // inner, size // inner
        )
        joined = (*found.dims[dim], *found.dims[dim + 1])
        dims = (*found.dims[:dim], joined, *found.dims[dim + 2 :])
        return dataclasses.replace(found, dims=dims)
    stop = start + (size - 1) * stride + 1
    return along(
        x,
        dim,
        size,
        lambda array, axis: jax.lax.slice_in_dim(array, start, stop, stride, axis),
    )


def padded(x: Followed, dim: int, low: int, high: int, inside: int = 0) -> Followed:
    """Returns the array with zeros around and between entries along one dimension."""
    if len(x.dims[dim]) > 1:
        raise Refused("padding an axis that a reshape merged or granularity divides")
    if not x.dims[dim]:
        x = _with_axis(x, dim)
    at = positions(x.dims)[dim].start
    (old,) = x.dims[dim]

    def wider(array):
        config = [(0, 0, 0)] * array.ndim
        config[at] = (low, high, inside)
        return jax.lax.pad(array, jnp.zeros([], array.dtype), config)

    terms = []
    for coordinates, basis in x.terms:
        if coordinates.shape[at] == basis.shape[at] == 1:
            shape = list(coordinates.shape)
            shape[at] = old
            coordinates = wider(jnp.broadcast_to(coordinates, shape))
        else:
            coordinates, basis = (
                wider(y) if y.shape[at] > 1 else y for y in (coordinates, basis)
            )
        terms.append(Term(coordinates, basis))
    size = low + high + old + inside * (old - 1)
    found = dataclasses.replace(x, terms=tuple(terms))
    if size > 1:
        return dataclasses.replace(found, dims=_with(x, dim, (size,)))
    return found.changed(lambda y: jnp.squeeze(y, at), _with(x, dim, ()))


def stacked(pieces: Sequence[Followed], dim: int) -> Followed:
    """Returns pieces of one structure as one array, with their number as an atom.

    Args:
        pieces: Pieces that differ in the values of their arrays alone.
        dim: The dimension that gets the number of pieces as its outermost atom.
    """
    first = pieces[0]
    at = positions(first.dims)[dim].start
    terms = tuple(
        Term(*(jnp.stack(arrays, at) for arrays in zip(*each, strict=True)))
        for each in zip(*(piece.terms for piece in pieces), strict=True)
    )
    dims = _with(first, dim, (len(pieces), *first.dims[dim]))
    return dataclasses.replace(first, terms=terms, dims=dims)


def _with(x: Followed, dim: int, atoms: tuple[int, ...]):
    """Returns the dimensions with other atoms in one of them."""
    return (*x.dims[:dim], atoms, *x.dims[dim + 1 :])


def _with_axis(x: Followed, dim: int) -> Followed:
    """Returns the array with an axis for a dimension of size 1."""
    at = positions(x.dims)[dim].start
    return x.changed(lambda array: jnp.expand_dims(array, at), _with(x, dim, (1,)))


def leading(x: Followed) -> tuple[tuple[jax.Array, ...], Callable]:
    """Returns the arrays for a scan, and a function from a step's rows to its piece.

    Arrays that do not vary along the first dimension are not cut.
    """
    if len(x.dims[0]) > 1:
        raise Refused("over an axis that a reshape merged or granularity divides", x)
    is_cut = [
        bool(x.dims[0]) and array.shape[0] > 1 for term in x.terms for array in term
    ]
    arrays = [array for term in x.terms for array in term]

    def step(rows):
        value, *pieces = rows
        left = iter(pieces)
        each = [
            next(left) if cut_ else (array[0] if x.dims[0] else array)
            for array, cut_ in zip(arrays, is_cut, strict=True)
        ]
        terms = tuple(map(Term, each[::2], each[1::2]))
        return dataclasses.replace(x, value=value, terms=terms, dims=x.dims[1:])

    scanned = [array for array, cut_ in zip(arrays, is_cut, strict=True) if cut_]
    return (x.value, *scanned), step
