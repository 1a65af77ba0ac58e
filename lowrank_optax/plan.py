"""What is projected, how, and what is not and why: decided here, from shapes alone."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbers,
    LowRankDimensionNumbers,
    MatrixView,
    Side,
    dimension_numbers_by_shape,
    matrix_view,
)


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
    numbers = _numbers_by_path(dimension_numbers, params)
    leaves = jax.tree.leaves_with_path(params)
    return {
        path: _plan_leaf(path, leaf, capacity, side, numbers, granularity)
        for path, leaf in leaves
    }


def _plan_leaf(path, leaf, capacity, side, numbers, granularity) -> LeafPlan:
    name = jax.tree_util.keystr(path) or "(the whole tree)"
    if path not in numbers:
        raise ValueError(f"dimension_numbers has no entry for {name}.")

    def full_size(reason, view=None):
        return LeafPlan(name, tuple(leaf.shape), view, 0, reason)

    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return full_size(f"its dtype {leaf.dtype} is not a real floating one")
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
        dimension_numbers,
        is_leaf=lambda x: x is None or isinstance(x, LowRankDimensionNumbers),
    )
    for path, leaf in leaves:
        if leaf is not None and not isinstance(leaf, LowRankDimensionNumbers):
            raise ValueError(
                f"dimension_numbers{jax.tree_util.keystr(path)} must be "
                f"LowRankDimensionNumbers or None, got {leaf!r}."
            )
    return dict(leaves)


class Announcement(NamedTuple):
    """What one low-rank transformation has decided in its ``init``.

    Attributes:
        plans: Key path -> plan, of every leaf that it was given.
        parts: The choices that make its subspaces.
    """

    plans: dict[tuple, LeafPlan]
    parts: Any


_observers: contextvars.ContextVar[list[Announcement] | None] = contextvars.ContextVar(
    "lowrank_optax_plans", default=None
)


def announce(plans: dict[tuple, LeafPlan], parts: Any) -> None:
    """Tells who is listening, if anybody is, what an ``init`` has decided."""
    observed = _observers.get()
    if observed is not None:
        observed.append(Announcement(plans, parts))


@contextlib.contextmanager
def listening(heard_outside: bool = True) -> Iterator[list[Announcement]]:
    """Yields the list in which each ``init`` inside the context announces itself.

    Args:
        heard_outside: Whether who listened before hears it too, when the context ends.
    """
    observed: list[Announcement] = []
    before = _observers.get()
    token = _observers.set(observed)
    try:
        yield observed
    finally:
        _observers.reset(token)
        if before is not None and heard_outside:
            before.extend(observed)


def announcements(
    optimizer: optax.GradientTransformation, params: Any
) -> list[Announcement]:
    """Returns what ``optimizer.init`` announces for parameters or shapes."""
    with listening() as heard:
        # A function of its own each time: eval_shape would remember init, and not call.
        jax.eval_shape(lambda p: optimizer.init(p), params)
    return heard


def projections(
    optimizer: optax.GradientTransformation, params: Any
) -> dict[str, LeafPlan]:
    """Lists what ``optimizer`` projects, how, and what it does not and why.

    The optimizer's own ``init`` is asked, on shapes only, so that the answer is what it
    will do, however deeply chained, masked or partitioned it is.

    Args:
        optimizer: Any Optax transformation.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        Key path -> plan, for each leaf of ``params``. Printing a plan gives a sentence.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
        >>> plans = projections(lowrank_optax.galore(1e-2, rank=4), params)
        >>> print(plans["['w']"])
        ['w'] 64x32: (64 x 32), columns projected, 32 -> 4
        >>> print(plans["['b']"])
        ['b'] 32: full size, fewer than two axes
    """
    heard = announcements(optimizer, params)
    by_path = {plan.path: plan for who in heard for plan in who.plans.values()}

    def plan_of(path, leaf):
        name = jax.tree_util.keystr(path) or "(the whole tree)"
        reason = "not given to a low-rank transformation"
        return by_path.get(name, LeafPlan(name, tuple(leaf.shape), None, 0, reason))

    leaves = jax.tree.leaves_with_path(params)
    plans = (plan_of(path, leaf) for path, leaf in leaves)
    return {plan.path: plan for plan in plans}
