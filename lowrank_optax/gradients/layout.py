"""Projected gradients and sketches, spread over the axes of their parameter."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import with_automatic_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView

# The atoms of each dimension of an array made of a parameter: their sizes, all above 1,
# the outermost first. The product of the sizes is the length of the dimension.
Dims = tuple[tuple[int, ...], ...]
# The atoms along which coordinates vary, bases, test matrices, and sketches.
_KEPT = ("stack", "kept", "block")
_PROJECTED = ("stack", "projected")
_TEST = ("kept", "block")
_WHOLE = ("stack", "block", "projected")


@dataclasses.dataclass(frozen=True)
class _Atom:
    """An axis of a parameter, or one digit of an axis that granularity divides."""

    axis: int
    size: int
    side: Literal["stack", "kept", "block", "projected"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Coordinates and a basis, laid out along the axes of the parameter.

    Both get one axis per atom, in the parameter's order, and the rank. An array has the
    atom's size where it varies along the atom, else 1. The gradient G of the parameter
    is then sum_r coordinates * basis, broadcast, whatever the axes mean. A sketch
    Omega^T G and its test matrix Omega are laid out in the same way, with the sides of
    the matrix exchanged.

    Attributes:
        view: The parameter as matrices.
    """

    view: MatrixView

    @functools.cached_property
    def _atoms(self) -> tuple[_Atom, ...]:
        """Atoms above 1 in the parameter's order."""
        shape, view = self.view.shape, self.view
        cut = self._cut or dict.fromkeys(view.projected_axes, 1)
        found = []
        for axis, size in enumerate(shape):
            if axis in view.stack_axes:
                found.append(_Atom(axis, size, "stack"))
            elif axis in view.kept_axes:
                found.append(_Atom(axis, size, "kept"))
            else:
                blocks = cut[axis]
                found.append(_Atom(axis, blocks, "block"))
                found.append(_Atom(axis, size // blocks, "projected"))
        return tuple(atom for atom in found if atom.size > 1)

    @functools.cached_property
    def _cut(self) -> dict[int, int] | None:
        """Blocks of each projected axis; None, if a block ends inside a step."""
        left, cut = self.view.granularity, {}
        for axis in self.view.projected_axes:
            size = self.view.shape[axis]
            blocks = math.gcd(left, size)
            if blocks not in (left, size):
                return None
            cut[axis] = blocks
            left //= blocks
        return cut

    @property
    def dims(self) -> Dims:
        """Atoms of each dimension of the parameter."""
        axes = range(len(self.view.shape))
        return tuple(
            tuple(atom.size for atom in self._atoms if atom.axis == axis)
            for axis in axes
        )

    def zeros(self, leaf: Any, rank: int, dtype: Any) -> jax.Array:
        """Returns zero coordinates, (*atoms, r), with the leaf's sharding.

        Blocks without atoms become columns: r is then the granularity times the rank.
        """
        return self._zeros(leaf, self._rank(rank), dtype, _KEPT)

    def sketch_zeros(self, leaf: Any, width: int, dtype: Any) -> jax.Array:
        """Returns a sketch of zeros, (*atoms, k), with the leaf's sharding.

        It is a sketch of each block: a program may scale the blocks differently. Blocks
        without atoms become columns, as in :meth:`zeros`.
        """
        return self._zeros(leaf, self._rank(width), dtype, _WHOLE)

    def basis(self, leaf: Any, basis: jax.Array) -> jax.Array:
        """Returns a basis (*stack, b/c, r) as (*atoms, r), with the leaf's sharding."""

        def apart(basis):
            # One basis per block, in columns of its own.
            eye = jnp.eye(self.view.granularity, dtype=basis.dtype)
            return jnp.einsum("ij,...br->...ibjr", eye, basis)

        return self._spread(leaf, basis, _PROJECTED, apart)

    def test_matrix(self, leaf: Any, omega: jax.Array) -> jax.Array:
        """Returns Omega (a*c, k) as (*atoms, k), with the leaf's sharding."""

        def apart(omega):
            # The rows of each block, in columns of their own.
            return omega.reshape(-1, self._rank(omega.shape[-1]))

        return self._spread(leaf, omega, _TEST, apart)

    def public(self, like: jax.Array, coordinates: jax.Array) -> jax.Array:
        """Returns coordinates (*atoms, r) as (*stack, a*c, r), sharded as ``like``."""

        def gathered(coordinates):
            return self._gathered(coordinates, _KEPT).reshape(like.shape)

        return with_automatic_axes(gathered, like, coordinates)

    def public_sketch(self, like: jax.Array, sketch: jax.Array) -> jax.Array:
        """Returns a sketch (*atoms, k) as (*stack, k, b/c), sharded as ``like``."""

        def gathered(sketch):
            view, found = self.view, self._gathered(sketch, _WHOLE)
            blocks = (*view.stack, view.granularity, view.projected_size)
            if self._cut is None:
                # Of each block, the columns of its own rows.
                found = found.reshape(*blocks, view.granularity, like.shape[-2])
                return jnp.einsum("...ibik->...kb", found)
            found = found.reshape(*blocks, like.shape[-2]).sum(-3)
            return jnp.swapaxes(found, -1, -2)

        return with_automatic_axes(gathered, like, sketch)

    def _spread(self, leaf: Any, array: jax.Array, sides, apart: Callable) -> jax.Array:
        """Returns a basis or a test matrix as (*atoms, r), with the leaf's sharding.

        Args:
            leaf: The parameter.
            array: A basis or a test matrix.
            sides: Along which the array varies.
            apart: Applied to the array if its blocks have no atoms.
        """
        rank = self._rank(array.shape[-1])
        like = self._zeros(leaf, rank, array.dtype, sides)
        order, shape = self._order(sides)

        def spread(array):
            array = apart(array) if self._cut is None else array
            array = array.reshape(*shape, rank)
            inverse = sorted(range(len(order)), key=order.__getitem__)
            return array.transpose(*inverse, len(order)).reshape(like.shape)

        return with_automatic_axes(spread, like, array)

    def _gathered(self, array: jax.Array, sides) -> jax.Array:
        """Returns (*atoms, r) with the axes of these sides alone, side after side."""
        order, shape = self._order(sides)
        sizes = [shape[order.index(i)] for i in sorted(order)]
        places = [sorted(order).index(i) for i in order]
        found = array.reshape(*sizes, array.shape[-1])
        return found.transpose(*places, len(order))

    def _rank(self, rank: int) -> int:
        return rank * self.view.granularity if self._cut is None else rank

    def _order(self, sides) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the positions and sizes of these sides' atoms, side after side."""
        view = self.view
        axes = {
            "stack": view.stack_axes,
            "kept": view.kept_axes,
            "block": view.projected_axes,
            "projected": view.projected_axes,
        }
        order = tuple(
            i
            for side in sides
            for axis in axes[side]
            for i, atom in enumerate(self._atoms)
            if (atom.axis, atom.side) == (axis, side)
        )
        return order, tuple(self._atoms[i].size for i in order)

    def _zeros(self, leaf: Any, rank: int, dtype: Any, sides) -> jax.Array:
        shape, axes, seen = [], [], set()
        for atom in self._atoms:
            varies = atom.side in sides
            shape.append(atom.size if varies else 1)
            # The outermost digit of an axis has the sharding of the axis.
            axes.append((atom.axis,) if varies and atom.axis not in seen else ())
            seen.add(atom.axis)
        return zeros_beside(leaf, (*shape, rank), dtype, (*axes, ()))
