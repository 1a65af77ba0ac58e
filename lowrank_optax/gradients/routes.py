"""The order of products in a projected gradient.

A term's gradient is a sum of products of three arrays: the gradient dy of a product,
its other operand x, and the basis P. The basis is first multiplied with the array whose
axes it sums away.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from lowrank_optax.gradients.followed import Followed, Refused, Term, varies

RANK = "rank"


@dataclasses.dataclass(frozen=True)
class Route:
    """The order for one term.

    Attributes:
        with_other: Whether the first product is of basis and other operand; else of
            basis and gradient.
        labels: Labels of the first product's result, the rank last.
        coordinates: Labels along which the coordinates vary, the rank last.
        basis: Labels along which the basis varies, the rank last.
    """

    with_other: bool
    labels: tuple[Any, ...]
    coordinates: tuple[Any, ...]
    basis: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """The routes for the gradient of one followed operand of a product.

    Attributes:
        is_left: Whether the operand is the left one.
        other: Labels of each dimension of the other operand.
        result: Labels of each dimension of the product.
        sizes: Sizes of the labels 0, 1, ...; the operand's atoms come first.
        routes: One route per term.
    """

    is_left: bool
    other: tuple[tuple[int, ...], ...]
    result: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    routes: tuple[Route, ...]

    def split(self, array: jax.Array, dims: Sequence[Sequence[int]]) -> jax.Array:
        """Returns an array with one axis for each label of its dimensions."""
        return array.reshape([self.sizes[label] for label in joined(dims)])


def operand_of(
    numbers: Any, is_left: bool, own: Followed, other: Sequence[int]
) -> Operand:
    """Returns the routes for the gradient of a followed operand.

    Args:
        numbers: Dimension numbers of the ``dot_general``.
        is_left: Whether the operand is the left one.
        own: The operand.
        other: Shape of the other operand.

    Raises:
        Refused: If the projected gradient would cost more than the full gradient.
    """
    sums, batches = (pair if is_left else pair[::-1] for pair in numbers)
    met = dict(zip((*sums[1], *batches[1]), (*sums[0], *batches[0]), strict=True))
    count = itertools.count()
    of_own = tuple(tuple(next(count) for _ in dim) for dim in own.dims)
    of_other = tuple(
        of_own[met[i]] if i in met else (next(count),) for i in range(len(other))
    )
    sizes = (*own.atoms, *(n for i, n in enumerate(other) if i not in met))
    free = (
        tuple(x for i, x in enumerate(of_own) if i not in met.values()),
        tuple(x for i, x in enumerate(of_other) if i not in met),
    )
    left, right = free if is_left else free[::-1]
    result = (*(of_own[i] for i in batches[0]), *left, *right)
    routes = tuple(
        _route(joined(of_own), joined(of_other), joined(result), term, sizes)
        for term in own.terms
    )
    return Operand(is_left, of_other, result, sizes, routes)


def _route(own, other, result, term: Term, sizes: Sequence[int]) -> Route:
    """Returns the order with the smallest kept array.

    Neither of the two products may run over all axes of the full gradient's product,
    r times, unless the kept array is like an existing array.
    """
    coordinates, basis = (
        tuple(label for label, is_in in zip(own, varies(array), strict=True) if is_in)
        for array in term
    )
    found = {}
    for with_other, near, far in ((True, other, result), (False, result, other)):
        met = {*near} & {*basis} - {*coordinates} - {*far}
        labels = tuple(x for x in dict.fromkeys((*near, *basis)) if x not in met)
        is_less = all({*y} < {*near, *far} for y in ((*near, *basis), (*labels, *far)))
        if is_less or {*labels} <= {*near} or {*labels} <= {*far}:
            route = Route(
                with_other, (*labels, RANK), (*coordinates, RANK), (*basis, RANK)
            )
            found[route] = math.prod(sizes[label] for label in labels)
    if not found:
        raise Refused(
            "which neither sums over the whole projected side nor leaves this side "
            "whole. Either the matrices are not those that dimension_numbers name (by "
            "default an unknown leaf is a stack of matrices of its last two axes; a "
            "kernel (embed, heads, head_dim) needs "
            "LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))), or the "
            "product mixes the matrices of a stack"
        )
    return min(found, key=found.__getitem__)


def joined(dims: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns the labels of all dimensions in a row."""
    return tuple(label for dim in dims for label in dim)
