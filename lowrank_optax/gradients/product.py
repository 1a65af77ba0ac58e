"""A product with a parameter, with a reverse rule for the projected gradient.

For y = x W and a basis P of the rows of W, P^T G = (x P)^T dy. For a basis of the
columns, G P = x^T (dy P). G = x^T dy is never formed: T r (n + m) multiplications take
the place of T n m. For a basis of the rows the backward pass keeps x P (T, r) in place
of x (T, n).
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
from lowrank_optax.gradients.contraction import contract, type_of_contraction
from lowrank_optax.gradients.followed import (
    Followed,
    Term,
    TypeOf,
    value_of,
    varies,
    without_ones,
)
from lowrank_optax.gradients.routes import Operand, Route, joined, operand_of
from lowrank_optax.matrix.sharding import with_automatic_axes


@dataclasses.dataclass(frozen=True)
class _Dot:
    """One ``dot_general``.

    Attributes:
        params: Parameters of the operation.
        operands: Routes for the gradient of each followed operand; None for a plain
            operand.
    """

    params: tuple[tuple[str, Any], ...]
    operands: tuple[Operand | None, Operand | None]

    def __call__(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Returns the product."""
        return jax.lax.dot_general(left, right, **dict(self.params))

    @property
    def precision(self) -> Any:
        """The user's precision, for the left and the right operand."""
        return dict(self.params).get("precision")

    def narrow(
        self, own: Operand, route: Route, basis: jax.Array, other: jax.Array
    ) -> jax.Array:
        """Returns the other operand in the subspace, with the route's labels.

        The basis takes the position of the followed operand.
        """
        pair = (
            (without_ones(basis).astype(other.dtype), route.basis),
            (own.split(other, own.other), joined(own.other)),
        )
        left, right = pair if own.is_left else pair[::-1]
        return contract(*left, *right, route.labels, self.precision)

    def coordinates(
        self, own: Operand, route: Route, dy: jax.Array, kept: jax.Array, basis: Any
    ) -> jax.Array:
        """Returns the gradient of a term's coordinates, float32 or wider.

        As in JAX's own reverse rule, dy is the left operand of each product.

        Args:
            own: The operand.
            route: Route of the term.
            dy: Gradient of the product.
            kept: The result of :meth:`narrow`, or the other operand itself.
            basis: (*atoms, r), if the route has not multiplied it with the other
                operand.
        """
        dy, labels = own.split(dy, own.result), joined(own.result)
        kept_labels = route.labels
        if not route.with_other:
            flat = without_ones(basis).astype(dy.dtype)
            dy = contract(dy, labels, flat, route.basis, route.labels, self.precision)
            labels, kept_labels = route.labels, joined(own.other)
            kept = own.split(kept, own.other)
        dtype = jnp.promote_types(jnp.promote_types(dy.dtype, kept.dtype), jnp.float32)
        return contract(
            dy, labels, kept, kept_labels, route.coordinates, self.precision, dtype
        )


def dot_general(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The rule of ``dot_general``."""
    numbers = equation.params["dimension_numbers"]
    params = tuple(
        (name, as_tuples(value))
        for name, value in equation.params.items()
        if value is not None
    )
    left, right = (
        operand_of(numbers, is_left, own, value_of(other).shape)
        if isinstance(own, Followed)
        else None
        for is_left, own, other in zip((True, False), inputs, inputs[::-1], strict=True)
    )
    return [_product(_Dot(params, (left, right)), *inputs)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dot: _Dot, left: Any, right: Any) -> jax.Array:
    """Returns a product; gradients of followed operands go to their coordinates."""
    return dot(value_of(left), value_of(right))


def _forward(dot: _Dot, *primals):
    inputs = jax.tree.map(lambda primal: primal.value, primals)
    values = tuple(map(value_of, inputs))
    saved = []
    for own, primal, x, other in zip(
        dot.operands, primals, inputs, values[::-1], strict=True
    ):
        if own is not None:
            saved.append(_kept(dot, own, primal, x, other))
        else:
            saved.append((TypeOf.array(x), other) if primal.perturbed else None)
    return dot(*values), saved


def _kept(dot: _Dot, own: Operand, primal: Followed, x: Followed, other: jax.Array):
    """Returns the arrays of a followed operand for the backward pass, term by term.

    A term whose basis meets the other operand keeps their product, in place of the
    other operand. If another term keeps this operand itself, all terms do.
    """
    kept = []
    keeps_other = any(
        flags.coordinates.perturbed and not route.with_other
        for route, flags in zip(own.routes, primal.terms, strict=True)
    )
    for route, flags, term in zip(own.routes, primal.terms, x.terms, strict=True):
        like = TypeOf.array(term.coordinates)
        if not flags.coordinates.perturbed:
            kept.append(None)
        elif route.with_other and not keeps_other:
            kept.append((like, _narrow(dot, own, route, term.basis, other), None))
        else:
            kept.append((like, other, term.basis))
    return x.without_arrays(), kept


def _narrow(dot: _Dot, own: Operand, route: Route, basis, other) -> jax.Array:
    """Returns the other operand in the subspace, sharded like its factors."""
    sizes = [*(own.sizes[i] for i in route.labels[:-1]), basis.shape[-1]]
    labels = iter(route.basis)
    of_basis = [(next(labels),) if is_in else () for is_in in varies(basis)]
    sharded = type_of_contraction(
        route.labels, sizes, (other, own.other), (basis, of_basis)
    )
    narrow = functools.partial(dot.narrow, own, route)
    return with_automatic_axes(narrow, sharded, basis, other)


def _backward(dot: _Dot, saved, dy):
    found = []
    for is_left, own, kept in zip((True, False), dot.operands, saved, strict=True):
        if kept is None or isinstance(dy, SymbolicZero):
            found.append(None)
        elif own is None:
            type_, other = kept

            def of(x, other=other, is_left=is_left):
                return dot(x, other) if is_left else dot(other, x)

            found += jax.linear_transpose(of, type_.like)(dy)
        else:
            x, terms = kept
            gradients = tuple(
                Term(term and _coordinates(dot, own, route, dy, *term), None)
                for route, term in zip(own.routes, terms, strict=True)
            )
            found.append(dataclasses.replace(x, terms=gradients))
    return tuple(found)


def _coordinates(dot: _Dot, own: Operand, route: Route, dy, type_, kept, basis):
    """Returns the gradient of one term's coordinates."""
    if route.with_other and basis is not None:
        kept, basis = _narrow(dot, own, route, basis, kept), None

    def gradient(dy, kept, basis):
        found = dot.coordinates(own, route, dy, kept, basis)
        return type_.shaped(found)

    return with_automatic_axes(gradient, type_.like, dy, kept, basis)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
