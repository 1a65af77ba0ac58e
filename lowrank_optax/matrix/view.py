"""A parameter leaf seen as a batch of oriented matrices, and back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.dimension_numbers import LowRankDimensionNumbers

Side = Literal["short", "long"]
"""The projected side of a matrix: the shorter or the longer one."""


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One leaf as a stack of matrices G (n, m), and their orientation to (a, b).

    b is the length of the projected side, a the length of the other side. At
    granularity c the oriented matrix (a, b) becomes (a*c, b/c): each row becomes c
    rows, and one basis (b/c, r) projects all rows. A view is static: it has shapes and
    axes, never values.

    Attributes:
        shape: Shape of the leaf.
        stack_axes: Axes that index the matrices of the stack.
        row_axes: Axes whose product is n.
        column_axes: Axes whose product is m.
        projects_rows: Whether b = n; else b = m.
        granularity: c, a divisor of b.
    """

    shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    projects_rows: bool
    granularity: int = 1

    @property
    def numbers(self) -> LowRankDimensionNumbers:
        """Dimension numbers of the leaf."""
        return LowRankDimensionNumbers(self.row_axes, self.column_axes)

    @property
    def stack(self) -> tuple[int, ...]:
        """Shape of the stack, () for a single matrix."""
        return tuple(self.shape[axis] for axis in self.stack_axes)

    @property
    def rows(self) -> int:
        """Number of rows n."""
        return math.prod(self.shape[axis] for axis in self.row_axes)

    @property
    def columns(self) -> int:
        """Number of columns m."""
        return math.prod(self.shape[axis] for axis in self.column_axes)

    @property
    def projected_axes(self) -> tuple[int, ...]:
        """Axes of the leaf that form the projected side."""
        return self.row_axes if self.projects_rows else self.column_axes

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """Axes of the leaf that form the other side."""
        return self.column_axes if self.projects_rows else self.row_axes

    @property
    def projected_size(self) -> int:
        """Length b/c of the rows that a basis projects."""
        return self._projected_side // self.granularity

    @property
    def kept_size(self) -> int:
        """Number a*c of rows that a basis projects."""
        side = self.columns if self.projects_rows else self.rows
        return side * self.granularity

    @property
    def _projected_side(self) -> int:
        return self.rows if self.projects_rows else self.columns

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf as (*stack, n, m)."""
        order = self.stack_axes + self.row_axes + self.column_axes
        shape = (*self.stack, self.rows, self.columns)
        return leaf.transpose(order).reshape(shape)

    def leaf(self, matrices: jax.Array) -> jax.Array:
        """Returns (*stack, n, m) in the leaf's shape: the inverse of ``matrices``."""
        order = self.stack_axes + self.row_axes + self.column_axes
        inverse = sorted(range(len(order)), key=order.__getitem__)
        permuted = matrices.reshape([self.shape[axis] for axis in order])
        return permuted.transpose(inverse)

    def oriented(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf as (*stack, a*c, b/c), the projected side last."""
        matrices = self.matrices(leaf)
        if self.projects_rows:
            # Axes of length one are dropped: beside them XLA writes the transposed
            # matrix to memory before a product (jaxlib 0.10, CPU).
            stack = [length for length in self.stack if length != 1]
            matrices = matrices.reshape(*stack, self.rows, self.columns)
            matrices = jnp.swapaxes(matrices, -1, -2)
        return matrices.reshape(*self.stack, self.kept_size, self.projected_size)

    def unoriented(self, oriented: jax.Array) -> jax.Array:
        """Returns (*stack, a*c, b/c) in the leaf's shape: ``oriented``'s inverse."""
        a = self.kept_size // self.granularity
        matrices = oriented.reshape(*self.stack, a, self._projected_side)
        if self.projects_rows:
            matrices = jnp.swapaxes(matrices, -1, -2)
        return self.leaf(matrices)

    def project(self, leaf: jax.Array, basis: jax.Array) -> jax.Array:
        """Returns G P (*stack, a*c, r) for a leaf G and a basis P (*stack, b/c, r)."""
        # G keeps its own layout, so that a sharded b stays where it is. Only small
        # matrices are transposed, or have a and c merged.
        matrices = self.matrices(leaf).astype(basis.dtype)
        if self.granularity == 1:
            sides = "...ba" if self.projects_rows else "...ab"
            return jnp.einsum(f"{sides},...br->...ar", matrices, basis)
        blocks = matrices.reshape(self._blocks)
        if self.projects_rows:
            # A product of rows, and its transposition, take less time on a CPU than a
            # product of columns.
            each = jnp.einsum("...br,...ba->...ra", self._each(basis), blocks)
            narrow = jnp.moveaxis(each, -1, -3)
        else:
            narrow = jnp.einsum("...acb,...br->...acr", blocks, basis)
        return narrow.reshape(*self.stack, self.kept_size, basis.shape[-1])

    def lift(self, coordinates: jax.Array, basis: jax.Array) -> jax.Array:
        """Returns N P^T in the leaf's shape, for coordinates N (*stack, a*c, r)."""
        if self.granularity > 1:
            return self.unblocked(self.lift_blocks(coordinates, basis))
        # The first side of the result is the first operand: nothing is transposed.
        if self.projects_rows:
            return self.leaf(jnp.einsum("...br,...ar->...ba", basis, coordinates))
        return self.leaf(jnp.einsum("...ar,...br->...ab", coordinates, basis))

    def lift_blocks(self, coordinates: jax.Array, basis: jax.Array) -> jax.Array:
        """Returns N P^T as (*stack, a, c, b/c), or (*stack, c, b/c, a) for rows.

        Apply functions of the entries to these blocks: :meth:`unblocked` then costs
        nothing, and the compiler writes over the product.
        """
        a = self.kept_size // self.granularity
        narrow = coordinates.reshape(*self.stack, a, self.granularity, basis.shape[-1])
        if self.projects_rows:
            each = jnp.swapaxes(narrow, -2, -3)
            return jnp.einsum("...br,...ar->...ba", self._each(basis), each)
        return jnp.einsum("...acr,...br->...acb", narrow, basis)

    def unblocked(self, blocks: jax.Array) -> jax.Array:
        """Returns the blocks of :meth:`lift_blocks` in the leaf's shape."""
        return self.leaf(blocks.reshape(*self.stack, self.rows, self.columns))

    def _each(self, basis: jax.Array) -> jax.Array:
        """Returns P for each block, (*stack, c, b/c, r): products batched over c."""
        shape = (*self.stack, self.granularity, *basis.shape[-2:])
        return jnp.broadcast_to(jnp.expand_dims(basis, -3), shape)

    @property
    def _blocks(self) -> tuple[int, ...]:
        """Shape of G with its projected side cut in c blocks of b/c."""
        a = self.kept_size // self.granularity
        cut = (self.granularity, self.projected_size)
        matrix = (*cut, a) if self.projects_rows else (a, *cut)
        return (*self.stack, *matrix)


def matrix_view(
    shape: Sequence[int],
    numbers: LowRankDimensionNumbers,
    side: Side,
    name: str,
    granularity: int = 1,
) -> MatrixView:
    """Returns the view of a leaf of this shape; ``name`` is for error messages.

    The view's granularity is the largest divisor of b that is at most ``granularity``.

    Raises:
        ValueError: If the axes do not exist, repeat, or leave a side without an axis.
    """
    shape = tuple(shape)
    rows = _axes(numbers.reduction_axis, shape, name)
    columns = _axes(numbers.output_axis, shape, name)
    named = rows + columns
    if len(set(named)) != len(named) or not rows or not columns:
        raise ValueError(
            f"{name}: reduction_axis and output_axis must be disjoint and not empty, "
            f"got {numbers} for shape {shape}."
        )
    stack = tuple(axis for axis in range(len(shape)) if axis not in named)
    n = math.prod(shape[axis] for axis in rows)
    m = math.prod(shape[axis] for axis in columns)
    # A square matrix projects its columns for "short", as GaLore's code does.
    projects_rows = n < m if side == "short" else n >= m
    b = n if projects_rows else m
    divisor = (
        next(c for c in range(min(granularity, b), 0, -1) if b % c == 0) if b else 1
    )
    return MatrixView(shape, stack, rows, columns, projects_rows, divisor)


def _axes(
    axes: int | Sequence[int], shape: tuple[int, ...], name: str
) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{name}: axis {axis} does not exist in shape {shape}.")
    return tuple(axis % len(shape) for axis in axes)
