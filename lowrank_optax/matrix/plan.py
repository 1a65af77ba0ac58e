"""Plans of the leaves: how each one is projected, or why it stays at full size."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers, numbers_by_path
from lowrank_optax.matrix.inference import Inferred, inferred_in_model
from lowrank_optax.matrix.view import MatrixView, Side, matrix_view


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The plan of a low-rank transformation for one leaf, from shapes alone.

    Attributes:
        path: Key path of the leaf, as ``jax.tree_util.keystr`` writes it; "(the whole
            tree)" for a tree that is one array.
        shape: Shape of the leaf.
        view: The leaf as matrices; None, if the leaf has no matrix.
        capacity: Columns of the basis; 0 if the leaf is not projected.
        reason: Why the leaf stays at full size; empty if the leaf is projected.
        asked_granularity: The user's granularity. The view has the largest divisor
            that is not above this number.
        role: Role of the leaf in its model, and the source of this role. Empty without
            :func:`lowrank_optax.by_role`.
    """

    path: str
    shape: tuple[int, ...]
    view: MatrixView | None
    capacity: int
    reason: str
    asked_granularity: int = 1
    role: str = ""

    @property
    def is_projected(self) -> bool:
        """Whether the leaf has a subspace."""
        return not self.reason

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        role = f"{self.role}, " if self.role else ""
        if self.reason or self.view is None:
            return f"{self.path} {shape}: {role}full size, {self.reason}"
        stack = "".join(f"{length} x " for length in self.view.stack)
        side = "rows" if self.view.projects_rows else "columns"
        text = (
            f"{self.path} {shape}: {role}{stack}"
            f"({self.view.rows} x {self.view.columns})"
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
        """The axes of rows and columns, if they are not the last two axes."""
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
        params: Arrays or shapes; boxes may name their axes.
        capacity: Columns of a basis.
        side: The projected side, "short" or "long".
        dimension_numbers: The user's dimension numbers; None: inferred.
        granularity: The user's granularity.

    Raises:
        ValueError: If dimension numbers are missing for a leaf, or do not fit it.
    """
    if dimension_numbers is None:
        numbers = inferred_in_model(params)
    else:
        asked = numbers_by_path(dimension_numbers, params)
        reason = "its dimension numbers are None"
        numbers = {path: Inferred(axes, reason) for path, axes in asked.items()}
    return {
        path: _plan_leaf(path, leaf, capacity, side, numbers, granularity)
        for path, leaf in leaves_by_path(params).items()
    }


def _plan_leaf(path, leaf, capacity, side, numbers, granularity) -> LeafPlan:
    name = leaf_name(path)
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
    """Returns each leaf's view as matrices, None for a leaf without a matrix."""
    return {path: plan.view for path, plan in plans.items()}


def warn_if_few_are_projected(plans: Mapping[tuple, LeafPlan]) -> None:
    """Warns if less than half of all matrix entries are projected."""
    matrices = [plan for plan in plans.values() if plan.view is not None]
    entries = {plan.path: math.prod(plan.shape) for plan in matrices}
    whole = sum(entries.values())
    part = sum(entries[plan.path] for plan in matrices if plan.is_projected)
    if 2 * part < whole:
        kept = [plan for plan in matrices if not plan.is_projected]
        largest = max(kept, key=lambda plan: entries[plan.path])
        warnings.warn(
            f"only {part / whole:.0%} of the entries of {len(matrices)} matrices are "
            f"projected; the largest of the rest: {largest}. "
            "lowrank_optax.projections(optimizer, params) lists all leaves. Set the "
            "axes of a matrix by dimension_numbers, or give leaves to another "
            "optimizer by optax.partition, which avoids this warning.",
            stacklevel=2,
        )
