"""Slices of a followed array, picked by indices: experts of a stack, embeddings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.lax import GatherScatterMode

from lowrank_optax.equations import bound
from lowrank_optax.gradients.followed import (
    Followed,
    Refused,
    Term,
    positions,
    sides,
)
from lowrank_optax.gradients.full_size import plain
from lowrank_optax.gradients.moves import cut, transposed


def picked(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``gather`` along one dimension, with the other dimensions whole.

    Slices of a stack are followed further. Picked rows or columns are activations, and
    their gradient dy is projected at once: dy P, summed by row, or dy^T P with the
    picked rows of P.
    """
    x, indices = inputs
    if not isinstance(x, Followed):
        raise Refused("as an index")
    numbers = equation.params["dimension_numbers"]
    dim, place = _dimension(equation, x)
    (value,) = bound(equation, [x.value, indices])
    # (*batch, *others): the batch lies where the result has no offset dimensions.
    found = _picked(x, dim, indices[..., place], equation.params["mode"])
    batch = iter(range(indices.ndim - 1))
    others = [i for i in range(x.value.ndim) if i not in numbers.collapsed_slice_dims]
    offsets = dict(zip(numbers.offset_dims, others, strict=True))
    order = [
        indices.ndim - 1 + offsets[i] if i in offsets else next(batch)
        for i in range(value.ndim)
    ]
    found = transposed(found, order).of(value)
    return [plain(found) if _is_side(x, dim) else found]


def _is_side(x: Followed, dim: int) -> bool:
    """Returns whether a dimension is a whole side of the matrices, not a stack axis.

    Blocks of granularity belong to the coordinates. They share a dimension with the
    rest of the projected side.
    """
    rest = cut(x, dim, 0, 1)
    found = []
    for whole, left in zip(x.terms, rest.terms, strict=True):
        first, second = sides(left)
        is_kept = any(
            any(first[i] for i in at) and not any(second[i] for i in at)
            for at in positions(rest.dims)
        )
        if all(map(any, sides(whole))):
            found.append(not (is_kept and any(second)))
    # A test matrix is one for the whole stack, whose axis then looks like a side of it:
    # the gradient's other term knows better.
    return any(found) or not found


def _dimension(equation: core.JaxprEqn, x: Followed) -> tuple[int, int]:
    """Returns the dimension of the picking, and its position in the indices."""
    numbers, sizes, mode = (
        equation.params[k] for k in ("dimension_numbers", "slice_sizes", "mode")
    )
    shape = x.value.shape
    cut_dims = [i for i, size in enumerate(sizes) if size != shape[i]]
    dims = cut_dims or [i for i in numbers.collapsed_slice_dims if shape[i] == 1][:1]
    # In a whole dimension the only index is 0, unless outside indices are filled.
    is_filled = mode == GatherScatterMode.FILL_OR_DROP
    if (
        len(dims) != 1
        or sizes[dims[0]] != 1
        or numbers.operand_batching_dims
        or dims[0] not in numbers.start_index_map
        or (is_filled and len(numbers.start_index_map) > 1)
    ):
        raise Refused("picking other than whole slices along one axis")
    return dims[0], numbers.start_index_map.index(dims[0])


def _picked(x: Followed, dim: int, indices: jax.Array, mode: Any) -> Followed:
    """Returns slices along one dimension, (*batch, *others), without their value."""
    if len(x.dims[dim]) > 1:
        raise Refused(
            "picking along an axis that a reshape merged or granularity divides"
        )
    at = positions(x.dims)[dim].start
    is_inside = (indices >= 0) & (indices < x.value.shape[dim])
    # Axes of length 1 are no atoms.
    batch = tuple(n for n in indices.shape if n > 1)

    def slices(array):
        if not x.dims[dim]:
            return array[(None,) * len(batch)]
        if array.shape[at] == 1:
            return jnp.squeeze(array, at)[(None,) * len(batch)]
        first = jnp.moveaxis(array, at, 0)
        return jax.lax.gather(
            first,
            indices.reshape(*batch, 1),
            jax.lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(batch), len(batch) + first.ndim - 1)),
                collapsed_slice_dims=(0,),
                start_index_map=(0,),
            ),
            slice_sizes=(1, *first.shape[1:]),
            mode=mode,
            fill_value=0,
        )

    dims = (
        *(((n,) if n > 1 else ()) for n in indices.shape),
        *(() if i == dim else atoms for i, atoms in enumerate(x.dims)),
    )
    found = x.changed(slices, dims)
    if mode != GatherScatterMode.FILL_OR_DROP:
        return found
    # All slices are the same here. A slice from outside has no gradient.
    kept = is_inside.reshape(*batch, *(1,) * (found.terms[0].basis.ndim - len(batch)))
    terms = tuple(
        Term(jnp.where(kept, term.coordinates, 0), term.basis)
        if not x.dims[dim] or all(array.shape[at] == 1 for array in before)
        else term
        for term, before in zip(found.terms, x.terms, strict=True)
    )
    return dataclasses.replace(found, terms=terms)
