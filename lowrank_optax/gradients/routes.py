"""In which order the arrays of a projected gradient are multiplied.

A term's gradient is a sum over three arrays: the gradient dy of a product, its other
operand x, and the basis P. The basis meets first the one whose axes it sums away.
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
        with_other: Whether the basis meets the other operand first; else the gradient.
        labels: Of what comes of that, the rank last.
        coordinates: Of the axes along which coordinates vary, the rank last.
        basis: The same of the basis.
    """

    with_other: bool
    labels: tuple[Any, ...]
    coordinates: tuple[Any, ...]
    basis: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """How the gradient of one followed operand of a product is computed.

    Attributes:
        is_left: Which operand it is.
        other: Labels of each dimension of the other operand.
        result: Labels of each dimension of the product.
        sizes: Of the labels, which are 0, 1, ...: first those of the operand's atoms.
        routes: One per term.
    """

    is_left: bool
    other: tuple[tuple[int, ...], ...]
    result: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    routes: tuple[Route, ...]

    def split(self, array: jax.Array, dims: Sequence[Sequence[int]]) -> jax.Array:
        """Returns an array, whose dimensions have these labels, with one axis each."""
        return array.reshape([self.sizes[label] for label in joined(dims)])


def operand_of(
    numbers: Any, is_left: bool, own: Followed, other: Sequence[int]
) -> Operand:
    """Returns how the gradient of a followed operand is computed.

    Args:
        numbers: Dimension numbers of the ``dot_general``.
        is_left: Which operand it is.
        own: The operand.
        other: Shape of the other one.

    Raises:
        Refused: If the gradient in the subspace would cost more than the full one.
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
    """Returns the order in which least is kept.

    Neither of its two products may run over all axes of the full gradient's, r times;
    unless what is kept is like an array that there is.
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
            "which neither sums over the whole projected side of its matrices nor "
            "leaves it whole: they are not the matrices that its dimension_numbers "
            "name. Those by default make a stack of matrices of its last two axes; a "
            "kernel (embed, heads, head_dim) needs "
            "LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))"
        )
    return min(found, key=found.__getitem__)


def joined(dims: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns the labels of all dimensions, one after the other."""
    return tuple(label for dim in dims for label in dim)
