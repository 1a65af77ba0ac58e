"""A product with a parameter whose reverse rule gives the projected gradient.

For y = x W and a basis P of the rows of W, P^T G = (x P)^T dy; for one of the columns,
G P = x^T (dy P). G = x^T dy is not formed: T r (n + m) multiplications instead of
T n m, and x P (T, r) is what the backward pass keeps, not x (T, n).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import with_automatic_axes
from lowrank_optax.matrix.view import MatrixView


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of an array x with what has become of a parameter.

    Attributes:
        contracting: Dimensions of x that are summed over, in the order that spells the
            sides of the parameter's matrix that they belong to.
        batch: Dimensions of x that run with the parameter's stack.
        y_batch: Dimensions of the result that do.
        y_free: Dimensions of the result that the parameter has and x has not, in the
            order that spells the other side.
        contracts_projected: Whether the projected side is summed over.
        view: Of the parameter.
        numbers: Remaining arguments of ``dot_general``, with the parameter second.
    """

    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    y_batch: tuple[int, ...]
    y_free: tuple[int, ...]
    contracts_projected: bool
    view: MatrixView
    numbers: tuple[tuple[str, Any], ...]

    def dot(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the product."""
        return jax.lax.dot_general(x, kernel, **dict(self.numbers))

    def narrow(self, x: jax.Array, basis: jax.Array) -> jax.Array:
        """Returns what the backward pass needs: (*batch, T, c, r) or (*batch, T, a)."""
        flat = _flat(x, self.batch, self.contracting)
        if not self.contracts_projected:
            return flat
        return self._projected(flat, basis)

    def coordinates(
        self, narrow: jax.Array, dy: jax.Array, basis: jax.Array
    ) -> jax.Array:
        """Returns the projected gradient, (*batch, a*c, r), float32 or wider."""
        flat = _flat(dy, self.y_batch, self.y_free)
        if self.contracts_projected:
            kept, cut = flat, narrow
        else:
            kept, cut = narrow, self._projected(flat, basis)
        found = jnp.einsum(
            "...ta,...tcr->...acr",
            kept,
            cut,
            preferred_element_type=jnp.promote_types(kept.dtype, jnp.float32),
        )
        a, c, r = found.shape[-3:]
        return found.reshape(*found.shape[:-3], a * c, r)

    def _projected(self, flat: jax.Array, basis: jax.Array) -> jax.Array:
        """Returns (*batch, T, c, r) from (*batch, T, b)."""
        c, side = self.view.granularity, self.view.projected_size
        cut = flat.reshape(*flat.shape[:-1], c, side)
        return jnp.einsum("...tcb,...br->...tcr", cut, basis.astype(flat.dtype))


def _flat(array: jax.Array, batch: tuple[int, ...], last: tuple[int, ...]) -> jax.Array:
    """Returns an array as (*batch, everything else, last), the last ones merged."""
    others = [i for i in range(array.ndim) if i not in batch + last]
    moved = array.transpose(*batch, *others, *last)
    lengths = [array.shape[i] for i in batch]
    size = math.prod(array.shape[i] for i in last)
    rest = math.prod(array.shape[i] for i in others)
    return moved.reshape(*lengths, rest, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    spec: Product,
    x: jax.Array,
    kernel: jax.Array,
    coordinates: jax.Array,
    basis: jax.Array,
) -> jax.Array:
    """Returns x times the kernel; the gradient goes to the coordinates.

    Args:
        spec: Which dimensions meet.
        x: Any array.
        kernel: What has become of the parameter; its own gradient is none.
        coordinates: (*batch, a*c, r); only its gradient counts.
        basis: (*batch, b/c, r).
    """
    del coordinates, basis
    return spec.dot(x, kernel)


def _forward(spec, x, kernel, coordinates, basis):
    narrow = spec.narrow(x, basis)
    # Of x and of the coordinates, types alone go on.
    types = map(_Type, jax.eval_shape(lambda *arrays: arrays, x, coordinates))
    return spec.dot(x, kernel), (narrow, kernel, basis, *types)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Type:
    """Shape, dtype, sharding and what it varies over, which are no arrays."""

    like: jax.ShapeDtypeStruct


def _backward(spec, residuals, dy):
    narrow, kernel, basis, x, coordinates = residuals
    (dx,) = jax.linear_transpose(lambda x: spec.dot(x, kernel), x.like)(dy)

    def gradient(narrow, dy, basis):
        return spec.coordinates(narrow, dy, basis).astype(coordinates.like.dtype)

    found = with_automatic_axes(gradient, coordinates.like, narrow, dy, basis)
    return dx, None, found, None


product.defvjp(_forward, _backward)
