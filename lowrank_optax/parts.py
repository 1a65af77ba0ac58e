"""The choices that make a low-rank transformation, besides its core."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lowrank_optax.checks import as_count, check_is_static
from lowrank_optax.kinds import Kind, kinds_of
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.plan import LeafPlan, plan_leaves
from lowrank_optax.matrix.view import Side
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.budget import Budget
from lowrank_optax.rules.dct_columns import DctColumns
from lowrank_optax.rules.power_iteration import PowerIteration
from lowrank_optax.rules.random_bases import RandomBasis
from lowrank_optax.rules.ranks import FixedRank, RankRule, as_rank_rule
from lowrank_optax.rules.rebase import RebaseRule, as_rebase_rule
from lowrank_optax.rules.residual import Dropped, ResidualRule
from lowrank_optax.rules.schedules import RefreshRule


class Parts(NamedTuple):
    """The choices that make a subspace; see :func:`scale_by_low_rank`."""

    rank: RankRule
    basis: BasisRule | RandomBasis
    refresh: RefreshRule
    rebase: RebaseRule
    residual: ResidualRule
    side: Side
    granularity: int
    dimension_numbers: DimensionNumbers | None
    moments: Mapping[str, Kind]
    seed: jax.typing.ArrayLike

    @property
    def is_random(self) -> bool:
        """Whether bases are drawn when needed, and not stored."""
        return isinstance(self.basis, RandomBasis)

    @property
    def is_numbered(self) -> bool:
        """Whether the state holds column numbers in the place of the columns."""
        return isinstance(self.basis, DctColumns)

    @property
    def uses_residual(self) -> bool:
        """Whether every update needs what lies outside the subspaces."""
        return self.residual.needs_full_gradients

    @property
    def follows_each_gradient(self) -> bool:
        """Whether every update moves the bases, by the full gradient."""
        return isinstance(self.basis, PowerIteration)

    def plans(self, tree: Any, capacity: int = 0) -> dict[tuple, LeafPlan]:
        """Returns the plan of every leaf by its key path.

        Args:
            tree: Leaves at full size, or their shapes; boxes may name the axes.
            capacity: Columns of a basis. With 0 every leaf with a matrix is projected.
        """
        return plan_leaves(
            tree, capacity, self.side, self.dimension_numbers, self.granularity
        )


def make_parts(
    *,
    rank: int | RankRule,
    basis: BasisRule | RandomBasis,
    refresh: RefreshRule,
    rebase: str | RebaseRule,
    residual: ResidualRule | None = None,
    side: Side = "short",
    granularity: int = 1,
    dimension_numbers: DimensionNumbers | None = None,
    moments: Mapping[str, Kind] | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> Parts:
    """Returns the parts, checked.

    Raises:
        TypeError: If a part is no rule of its kind, or ``rank`` is an array.
        ValueError: If a value is unknown or out of its range.
    """
    if side not in ("short", "long"):
        raise ValueError(f"side must be 'short' or 'long', got {side!r}.")
    check_is_static("granularity", granularity, '("rank", "granularity")')
    rule = as_rank_rule(rank)
    residual = Dropped() if residual is None else residual
    _check_rule("basis", basis, ("compute", "draw"), "range_finder()")
    _check_rule("refresh", refresh, ("is_due",), "every(200)")
    _check_rule("residual", residual, ("needs_full_gradients",), "sign_residual()")
    if isinstance(basis, RandomBasis) and not isinstance(rule, FixedRank):
        why = "captures no energy for a rank rule to measure"
        if isinstance(rule, Budget):
            why = "is not stored, so that no state tells the columns that a budget gave"
        raise ValueError(f"a random basis {why}; give an int as rank, got {rank!r}.")
    return Parts(
        rank=rule,
        basis=basis,
        refresh=refresh,
        rebase=as_rebase_rule(rebase),
        residual=residual,
        side=side,
        granularity=as_count("granularity", granularity),
        dimension_numbers=dimension_numbers,
        moments=kinds_of(moments),
        seed=seed,
    )


def _check_rule(name: str, rule: Any, methods: Sequence[str], example: str) -> None:
    """Raises TypeError if a part has none of the methods of its rules."""
    if isinstance(rule, type) or not any(hasattr(rule, x) for x in methods):
        raise TypeError(f"{name} must be a rule, such as {example}, got {rule!r}.")


def check_subspace_is_enough(parts: Parts, path: tuple) -> None:
    """Raises ValueError if a transformation needs full gradients.

    Args:
        parts: Parts of the transformation.
        path: Key path of a leaf with a projected gradient.
    """
    if parts.uses_residual:
        raise ValueError(
            f"{leaf_name(path)}: this method needs the full gradient at "
            "every update; use jax.value_and_grad."
        )
