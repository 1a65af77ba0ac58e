"""Composable Optax transformations with low-rank optimizer state."""

from lowrank_optax.bases import BasisRule, Factor, exact_svd, range_finder
from lowrank_optax.inspection import ranks, subspaces
from lowrank_optax.low_rank import LowRankState, Subspace, scale_by_low_rank
from lowrank_optax.matrices import (
    LowRankDimensionNumbers,
    MatrixView,
    Side,
    dimension_numbers_by_shape,
)
from lowrank_optax.methods import adarankgrad, galore
from lowrank_optax.plan import LeafPlan, projections
from lowrank_optax.ranks import RankRule, energy_rank
from lowrank_optax.rebase import REBASE_RULES, RebaseRule, ldadam
from lowrank_optax.refresh import RefreshRule, every, on_convergence

__all__ = [
    "REBASE_RULES",
    "BasisRule",
    "Factor",
    "LeafPlan",
    "LowRankDimensionNumbers",
    "LowRankState",
    "MatrixView",
    "RankRule",
    "RebaseRule",
    "RefreshRule",
    "Side",
    "Subspace",
    "adarankgrad",
    "dimension_numbers_by_shape",
    "energy_rank",
    "every",
    "exact_svd",
    "galore",
    "ldadam",
    "on_convergence",
    "projections",
    "range_finder",
    "ranks",
    "scale_by_low_rank",
    "subspaces",
]
