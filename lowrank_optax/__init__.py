"""Composable Optax transformations with low-rank optimizer state."""

import importlib.metadata

from lowrank_optax.adapter import extract_adapter
from lowrank_optax.codes import decode
from lowrank_optax.gradients.value_and_grad import subspace_value_and_grad
from lowrank_optax.matrix.dimension_numbers import (
    LowRankDimensionNumbers,
    dimension_numbers_by_shape,
)
from lowrank_optax.matrix.inference import dimension_numbers_by_name
from lowrank_optax.matrix.roles import roles
from lowrank_optax.methods.adarankgrad import adarankgrad, scale_by_adarankgrad
from lowrank_optax.methods.apollo import apollo, scale_by_apollo
from lowrank_optax.methods.fira import fira, scale_by_fira
from lowrank_optax.methods.galore import galore, scale_by_galore
from lowrank_optax.methods.ldadam import ldadam, scale_by_ldadam
from lowrank_optax.methods.low_rank_muon import low_rank_muon, scale_by_low_rank_muon
from lowrank_optax.methods.projfactor import (
    ScaleByProjfactorState,
    projfactor,
    scale_by_projfactor,
)
from lowrank_optax.methods.sumo import scale_by_sumo, sumo
from lowrank_optax.methods.vlorp import scale_by_vlorp, vlorp
from lowrank_optax.neurons import ScaleByNeuronState, scale_by_neuron
from lowrank_optax.projected import Projected, Sketch
from lowrank_optax.report.memory_plan import memory_plan
from lowrank_optax.report.projections import projections
from lowrank_optax.report.ranks import ranks, subspaces
from lowrank_optax.report.state_shardings import state_shardings
from lowrank_optax.rules.bases import BasisRule, exact_svd, range_finder
from lowrank_optax.rules.budget import budget
from lowrank_optax.rules.dct_columns import dct_columns
from lowrank_optax.rules.power_iteration import power_iteration
from lowrank_optax.rules.random_bases import gaussian, rademacher
from lowrank_optax.rules.ranks import RankRule, energy_rank
from lowrank_optax.rules.rebase import REBASE_RULES, RebaseRule, ldadam_rebase
from lowrank_optax.rules.residual import ResidualRule
from lowrank_optax.rules.residual_orthogonalized import orthogonalized_residual
from lowrank_optax.rules.residual_scaled import scaled_residual
from lowrank_optax.rules.residual_signs import normalized_residual, sign_residual
from lowrank_optax.rules.schedules import RefreshRule, every, on_convergence
from lowrank_optax.storage.allocation import reallocate
from lowrank_optax.storage.low_bit import low_bit
from lowrank_optax.storage.resize import capacities, columns, compact, resize
from lowrank_optax.storage.restore import like_saved
from lowrank_optax.storage.rounding import stochastic_rounding
from lowrank_optax.subspace import ScaleByLowRankState, Subspace
from lowrank_optax.training.accumulate import accumulate
from lowrank_optax.training.by_role import by_role
from lowrank_optax.training.finite import apply_if_finite
from lowrank_optax.training.programs import TrainStep
from lowrank_optax.training.step import TrainState
from lowrank_optax.training.train_step import train_step
from lowrank_optax.transform import scale_by_low_rank

__all__ = [
    "REBASE_RULES",
    "BasisRule",
    "LowRankDimensionNumbers",
    "Projected",
    "RankRule",
    "RebaseRule",
    "RefreshRule",
    "ResidualRule",
    "ScaleByLowRankState",
    "ScaleByNeuronState",
    "ScaleByProjfactorState",
    "Sketch",
    "Subspace",
    "TrainState",
    "TrainStep",
    "accumulate",
    "adarankgrad",
    "apollo",
    "apply_if_finite",
    "budget",
    "by_role",
    "capacities",
    "columns",
    "compact",
    "dct_columns",
    "decode",
    "dimension_numbers_by_name",
    "dimension_numbers_by_shape",
    "energy_rank",
    "every",
    "exact_svd",
    "extract_adapter",
    "fira",
    "galore",
    "gaussian",
    "ldadam",
    "ldadam_rebase",
    "like_saved",
    "low_bit",
    "low_rank_muon",
    "memory_plan",
    "normalized_residual",
    "on_convergence",
    "orthogonalized_residual",
    "power_iteration",
    "projections",
    "projfactor",
    "rademacher",
    "range_finder",
    "ranks",
    "reallocate",
    "resize",
    "roles",
    "scale_by_adarankgrad",
    "scale_by_apollo",
    "scale_by_fira",
    "scale_by_galore",
    "scale_by_ldadam",
    "scale_by_low_rank",
    "scale_by_low_rank_muon",
    "scale_by_neuron",
    "scale_by_projfactor",
    "scale_by_sumo",
    "scale_by_vlorp",
    "scaled_residual",
    "sign_residual",
    "state_shardings",
    "stochastic_rounding",
    "subspace_value_and_grad",
    "subspaces",
    "sumo",
    "train_step",
    "vlorp",
]

try:
    __version__ = importlib.metadata.version("lowrank_optax")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+uninstalled"
