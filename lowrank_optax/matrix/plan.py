"""What is projected, how, and what is not and why: decided here, from shapes alone."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers, numbers_by_path
from lowrank_optax.matrix.inference import Inferred, inferred
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
            f"{self.path} {shape}: {stack}({self.view.rows} x {self.view.columns})"
            f"{self._axes}, {side} projected, "
            f"{self.view.projected_size} -> {self.capacity}"
        )
        granularity = self.view.granularity
        if granularity != 1:
            text += f", granularity {granularity}"
        if granularity != self.asked_granularity:
            b = self.view.projected_size * granularity
            text += f" ({self.asked_granularity} does not divide {b})"
        return text

    @property
    def _axes(self) -> str:
        """Which axes those are, where they are not the last two."""
        assert self.view is not None
        sides = self.view.row_axes, self.view.column_axes
        if sides == ((len(self.shape) - 2,), (len(self.shape) - 1,)):
            return ""
        rows, columns = (str(axes).replace(",)", ")") for axes in sides)
        return f", axes {rows} x {columns}"


def plan_leaves(
    params: Any,
    capacity: int,
    side: Side,
    dimension_numbers: DimensionNumbers | None,
    granularity: int = 1,
) -> dict[tuple, LeafPlan]:
    """Returns the plan of every leaf by its key path.

    Args:
        params: Arrays or shapes; their boxes may name their axes.
        capacity: Columns of a basis.
        side: Which one is projected.
        dimension_numbers: Of the user; None: inferred.
        granularity: Asked for.

    Raises:
        ValueError: If dimension numbers are missing for a leaf, or do not fit it.
    """
    if dimension_numbers is None:
        numbers = inferred(params)
    else:
        asked = numbers_by_path(dimension_numbers, params)
        reason = "its dimension numbers are None"
        numbers = {path: Inferred(axes, reason) for path, axes in asked.items()}
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
    axes, reason = numbers[path]
    if axes is None:
        return full_size("fewer than two axes" if leaf.ndim < 2 else reason)
    view = matrix_view(leaf.shape, axes, side, name, granularity)
    short_side = min(view.kept_size, view.projected_size)
    if short_side <= capacity:
        what = "short side"
        if view.granularity != 1:
            what = f"at granularity {view.granularity} short side"
        return full_size(f"{what} {short_side} is not above rank {capacity}", view)
    return LeafPlan(name, tuple(leaf.shape), view, capacity, "", granularity)


def views_of(plans: Mapping[tuple, LeafPlan]) -> dict[tuple, MatrixView | None]:
    """Returns how each leaf is seen as matrices, None if it is none."""
    return {path: plan.view for path, plan in plans.items()}


def warn_if_few_are_projected(plans: Mapping[tuple, LeafPlan]) -> None:
    """Warns if less than half of what the matrices hold is projected."""
    matrices = [plan for plan in plans.values() if plan.view is not None]
    entries = {plan.path: math.prod(plan.shape) for plan in matrices}
    whole = sum(entries.values())
    part = sum(entries[plan.path] for plan in matrices if plan.is_projected)
    if 2 * part < whole:
        kept = [plan for plan in matrices if not plan.is_projected]
        largest = max(kept, key=lambda plan: entries[plan.path])
        warnings.warn(
            f"only {part / whole:.0%} of what {len(matrices)} matrices hold is "
            f"projected; the largest of the rest: {largest}. All are listed by "
            "lowrank_optax.projections(optimizer, params); dimension_numbers says "
            "which axes form a matrix; optax.partition gives leaves to another "
            "optimizer, without this warning.",
            stacklevel=2,
        )
