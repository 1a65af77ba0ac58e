"""Ragged products: each group of rows of x times its own matrix of a stack.

As in :mod:`lowrank_optax.gradients.product`, a basis of the summed side multiplies x,
a basis of the other side the gradient dy. Each term is two ragged products, linear in
the coordinates. The reverse rule is the transpose of this linear function.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from lowrank_optax.equations import as_tuples
from lowrank_optax.gradients.followed import (
    Followed,
    Refused,
    Term,
    TypeOf,
)
from lowrank_optax.matrix.sharding import with_automatic_axes

# Dimensions of x (T, n), of the stack (g, n, m) and of the groups, as ragged_dot's.
_USUAL = ((((1,), (1,)), ((), ())), (0,), (0,))


def ragged_dot(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``ragged_dot_general``, in the form of ``jax.lax.ragged_dot``."""
    x, stack, *groups = inputs
    params = {k: v for k, v in equation.params.items() if v is not None}
    numbers = params.pop("ragged_dot_dimension_numbers")
    found = (
        numbers.dot_dimension_numbers,
        numbers.lhs_ragged_dimensions,
        numbers.rhs_group_dimensions,
    )
    if as_tuples(found) != _USUAL or not isinstance(stack, Followed) or len(groups) > 1:
        raise Refused("otherwise than jax.lax.ragged_dot(x, stack, sizes)")
    if any(len(dim) > 1 for dim in stack.dims):
        raise Refused("whose axes a reshape merged or granularity divides")
    if isinstance(x, Followed):
        raise Refused("with another projected parameter")
    sums = tuple(_sums(stack, term) for term in stack.terms)
    return [_product(_Ragged(tuple(params.items()), sums), x, stack, *groups)]


def _sums(stack: Followed, term: Term) -> bool:
    """Returns whether a term's basis is of the summed side."""
    missing = [i for i, dim in enumerate(stack.dims) if not dim]
    (_, c_in, c_out), (_, b_in, b_out) = (
        [size > 1 for size in jnp.expand_dims(array, missing).shape[:3]]
        for array in term
    )
    if not (b_out or c_in):
        return True
    if not (b_in or c_out):
        return False
    raise Refused("with matrices whose sides were mixed")


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """One ragged product.

    Attributes:
        params: Parameters of ``jax.lax.ragged_dot``.
        sums: For each term, whether the product sums over the side of its basis.
    """

    params: tuple[tuple[str, Any], ...]
    sums: tuple[bool, ...]

    def __call__(self, x: jax.Array, value: jax.Array, groups: jax.Array) -> jax.Array:
        """Returns the product."""
        return jax.lax.ragged_dot(x, value, groups, **dict(self.params))

    def inner(self, x: jax.Array, side: jax.Array, groups: jax.Array) -> jax.Array:
        """Returns one of a term's two products, by the side (g, n, r)."""
        precision = dict(self.params).get("precision")
        return jax.lax.ragged_dot(x, side, groups, precision=precision)


def _side(stack: Followed, array: jax.Array, groups: int, dim: int) -> jax.Array:
    """Returns coordinates or a basis as (g, side, r), for the side in ``dim``."""
    missing = [i for i, atoms in enumerate(stack.dims) if not atoms]
    array = jnp.expand_dims(array, missing).squeeze(3 - dim)
    sides = [sum(atoms) or 1 for atoms in stack.dims]
    return jnp.broadcast_to(array, (groups, sides[dim], array.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dot: _Ragged, x: jax.Array, stack: Followed, groups: jax.Array):
    """Returns the product; the stack's gradient goes to its coordinates."""
    return dot(x, stack.value, groups)


def _forward(dot: _Ragged, *primals):
    x, stack, groups = jax.tree.map(lambda primal: primal.value, primals)
    terms = []
    for sums, flags, term in zip(dot.sums, primals[1].terms, stack.terms, strict=True):
        kept = x
        if sums:
            basis = _side(stack, term.basis, groups.size, 1).astype(x.dtype)
            kept = dot.inner(x, basis, groups)
        saved = TypeOf.array(term.coordinates), kept, None if sums else term.basis
        terms.append(saved if flags.coordinates.perturbed else None)
    others = stack.value, groups, stack.without_arrays(), terms
    return dot(x, stack.value, groups), (TypeOf.array(x), *others)


def _backward(dot: _Ragged, saved, dy):
    type_, value, groups, stack, terms = saved
    if isinstance(dy, SymbolicZero):
        return None, None, None
    (dx,) = jax.linear_transpose(lambda x: dot(x, value, groups), type_.like)(dy)

    def of_term(sums, type_, kept, basis):
        dtype = jnp.promote_types(type_.like.dtype, dy.dtype)

        def gradient(dy, kept, basis, groups):
            def change(coordinates):
                """Returns the change of y for a change of the coordinates."""
                side = _side(stack, coordinates, groups.size, 2 if sums else 1)
                first = kept.astype(dtype)
                if sums:
                    return dot.inner(first, side.swapaxes(1, 2), groups)
                last = _side(stack, basis, groups.size, 2).astype(dtype)
                narrow = dot.inner(first, side, groups)
                return dot.inner(narrow, last.swapaxes(1, 2), groups)

            return jax.linear_transpose(change, type_.like)(dy.astype(dtype))[0]

        return with_automatic_axes(gradient, type_.like, dy, kept, basis, groups)

    found = tuple(
        Term(term and of_term(sums, *term), None)
        for sums, term in zip(dot.sums, terms, strict=True)
    )
    return dx, dataclasses.replace(stack, terms=found), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)
