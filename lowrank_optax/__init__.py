"""Composable Optax transformations with low-rank optimizer state."""

from lowrank_optax.accumulate import AccumulateState, Accumulation, accumulate
from lowrank_optax.allocation import energies, reallocate
from lowrank_optax.bases import BasisRule, exact_svd, range_finder
from lowrank_optax.budget import Budget, budget, parse_bytes
from lowrank_optax.capacity import (
    Columns,
    capacities,
    columns,
    compact,
    like_saved,
    resize,
    wanted_columns,
)
from lowrank_optax.channels import ChannelScaledState
from lowrank_optax.coded import Coded, decode
from lowrank_optax.inspection import ranks, subspaces
from lowrank_optax.low_bit import low_bit
from lowrank_optax.low_rank import LowRankState, scale_by_low_rank
from lowrank_optax.matrices import (
    LowRankDimensionNumbers,
    MatrixView,
    Side,
    dimension_numbers_by_shape,
)
from lowrank_optax.memory import Bytes, LeafMemory, MemoryPlan, memory_plan
from lowrank_optax.methods import adarankgrad, galore, projfactor, vlorp
from lowrank_optax.orthogonal import low_rank_muon, sumo
from lowrank_optax.plan import LeafPlan, projections
from lowrank_optax.projfactor import ProjFactorState, scale_by_projfactor
from lowrank_optax.random_bases import gaussian, rademacher
from lowrank_optax.ranks import RankRule, energy_rank
from lowrank_optax.rebase import REBASE_RULES, RebaseRule, ldadam_rebase
from lowrank_optax.refresh import RefreshRule, every, on_convergence
from lowrank_optax.relatives import apollo, fira, ldadam
from lowrank_optax.rounding import StochasticRoundingState, stochastic_rounding
from lowrank_optax.subspace import Subspace
from lowrank_optax.subspace_grad import SubspaceValueAndGrad, subspace_value_and_grad

__all__ = [
    "REBASE_RULES",
    "AccumulateState",
    "Accumulation",
    "BasisRule",
    "Budget",
    "Bytes",
    "ChannelScaledState",
    "Coded",
    "Columns",
    "LeafMemory",
    "LeafPlan",
    "LowRankDimensionNumbers",
    "LowRankState",
    "MatrixView",
    "MemoryPlan",
    "ProjFactorState",
    "RankRule",
    "RebaseRule",
    "RefreshRule",
    "Side",
    "StochasticRoundingState",
    "Subspace",
    "SubspaceValueAndGrad",
    "accumulate",
    "adarankgrad",
    "apollo",
    "budget",
    "capacities",
    "columns",
    "compact",
    "decode",
    "dimension_numbers_by_shape",
    "energies",
    "energy_rank",
    "every",
    "exact_svd",
    "fira",
    "galore",
    "gaussian",
    "ldadam",
    "ldadam_rebase",
    "like_saved",
    "low_bit",
    "low_rank_muon",
    "memory_plan",
    "on_convergence",
    "parse_bytes",
    "projections",
    "projfactor",
    "rademacher",
    "range_finder",
    "ranks",
    "reallocate",
    "resize",
    "scale_by_low_rank",
    "scale_by_projfactor",
    "stochastic_rounding",
    "subspace_value_and_grad",
    "subspaces",
    "sumo",
    "vlorp",
    "wanted_columns",
]
