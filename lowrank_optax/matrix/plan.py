"""What is projected, how, and what is not and why: decided here, from shapes alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.boxes import leaves_by_path, unboxed
from lowrank_optax.matrix.dimension_numbers import (
    DimensionNumbers,
    LowRankDimensionNumbers,
    dimension_numbers_by_shape,
)
from lowrank_optax.matrix.view import MatrixView, Side, matrix_view


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What a low-rank transformation does with one leaf.

    Attributes:
        path: Key path of the leaf, as ``jax.tree_util.keystr`` writes it.
        shape: Shape of the leaf.
        view: How it is seen as matrices; None, if it has none.
        capacity: Columns of its basis; 0 if it is not projected.
        reason: Why it stays at full size; empty if it is projected.
        asked_granularity: Granularity that was asked for; the view has the nearest
            divisor at or below it.
    """

    path: str
    shape: tuple[int, ...]
    view: MatrixView | None
    capacity: int
    reason: str
    asked_granularity: int = 1

    @property
    def is_projected(self) -> bool:
        """Whether the leaf has a subspace."""
        return not self.reason

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        if self.reason or self.view is None:
            return f"{self.path} {shape}: full size, {self.reason}"
        stack = "".join(f"{length} x " for length in self.view.stack)
        side = "rows" if self.view.projects_rows else "columns"
        text = (
            f"{self.path} {shape}: {stack}({self.view.rows} x {self.view.columns}), "
            f"{side} projected, {self.view.projected_size} -> {self.capacity}"
        )
        granularity = self.view.granularity
        if granularity != 1:
            text += f", granularity {granularity}"
        if granularity != self.asked_granularity:
            b = self.view.projected_size * granularity
            text += f" ({self.asked_granularity} does not divide {b})"
        return text


def plan_leaves(
    params: Any,
    capacity: int,
    side: Side,
    dimension_numbers: DimensionNumbers | None,
    granularity: int = 1,
) -> dict[tuple, LeafPlan]:
    """Returns the plan of every leaf by its key path.

    Raises:
        ValueError: If dimension numbers are missing for a leaf, or do not fit it.
    """
    numbers = _numbers_by_path(dimension_numbers, unboxed(params))
    return {
        path: _plan_leaf(path, leaf, capacity, side, numbers, granularity)
        for path, leaf in leaves_by_path(params).items()
    }


def _plan_leaf(path, leaf, capacity, side, numbers, granularity) -> LeafPlan:
    name = jax.tree_util.keystr(path) or "(the whole tree)"
    if path not in numbers:
        raise ValueError(f"dimension_numbers has no entry for {name}.")

    def full_size(reason, view=None):
        return LeafPlan(name, tuple(leaf.shape), view, 0, reason)

    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return full_size(f"its dtype {leaf.dtype} is not a real floating one")
    if 0 in leaf.shape:
        return full_size("it is empty")
    if numbers[path] is None:
        is_small = leaf.ndim < 2
        return full_size("fewer than two axes" if is_small else "left alone by request")
    view = matrix_view(leaf.shape, numbers[path], side, name, granularity)
    short_side = min(view.kept_size, view.projected_size)
    if short_side <= capacity:
        what = "short side"
        if view.granularity != 1:
            what = f"at granularity {view.granularity} short side"
        return full_size(f"{what} {short_side} is not above rank {capacity}", view)
    return LeafPlan(name, tuple(leaf.shape), view, capacity, "", granularity)


def _numbers_by_path(dimension_numbers: Any, params: Any) -> dict[tuple, Any]:
    if dimension_numbers is None:
        dimension_numbers = dimension_numbers_by_shape
    is_numbers = isinstance(dimension_numbers, LowRankDimensionNumbers)
    if callable(dimension_numbers) and not is_numbers:
        dimension_numbers = dimension_numbers(params)
    leaves = jax.tree.leaves_with_path(
        unboxed(dimension_numbers),
        is_leaf=lambda x: x is None or isinstance(x, LowRankDimensionNumbers),
    )
    for path, leaf in leaves:
        if leaf is not None and not isinstance(leaf, LowRankDimensionNumbers):
            raise ValueError(
                f"dimension_numbers{jax.tree_util.keystr(path)} must be "
                f"LowRankDimensionNumbers or None, got {leaf!r}."
            )
    return dict(leaves)
