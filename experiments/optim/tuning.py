"""The flags of the optimizer in fine-tuning, and what its methods have there.

The classes here take the place of those in :mod:`experiments.optim.options`, which they
are named after: some defaults differ, and the help says so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiments.optim import options
from experiments.optim.methods import OPTIMIZERS
from experiments.ranges import AtLeastOne, Count, Decay, Fraction, Inside, Positive

RANK = 8
_WARMUP = 0.06

# An update inside a subspace of r of b directions is sqrt(r / b) as long as Adam's: a
# seventh at rank 8 of 384. GaLore's recipe for GLUE scales it by 4.
_LIFTED: dict[str, Any] = {"block_scale": 4.0}
# An orthogonalized update harms what Adam has pre-trained, the more the larger it is
# (arXiv 2605.10468). At a scale of 1 the root mean square of its entries is 0.2 times
# the rate; Adam's is nearly the rate.
_ORTHOGONALIZED: dict[str, Any] = {"block_scale": 1.0, "update_proj_gap": 200}

# Name of a method -> what takes the place of its own defaults.
TUNING: dict[str, Mapping[str, Any]] = {
    "adamw": {"block_scale": 1.0},
    "adarankgrad": {
        **_LIFTED,
        # The paper has 0.48 for LLaMAs (its Table 4), and no average over refreshes.
        # The two together gave MiniLM fewer columns, and a worse end on the packaged
        # texts: docs/finetuning.md.
        "threshold": 0.3,
        "min_refresh_interval": 100,
        "max_refresh_interval": 200,
    },
    "galore": {**_LIFTED, "update_proj_gap": 500},
    # A random basis, of entries with variance 1 / r, lifts to Adam's length.
    "vlorp": {"block_scale": 1.0},
    "projfactor": {"block_scale": 1.0},
    "sumo": {**_ORTHOGONALIZED, **_LIFTED},
    "low_rank_muon": _ORTHOGONALIZED,
    "ldadam": _LIFTED,
    "fira": _LIFTED,
    "apollo": _LIFTED,
    "apollo_mini": {"block_scale": 1.0},
    "frugal": {"block_scale": 1.0},
    "muon": {"block_scale": 1.0},
    "scale": {"block_scale": 1.0},
    "stable_spam": {"block_scale": 1.0},
    "foam": {"block_scale": 1.0},
    "adafactor": {"block_scale": 1.0},
    # The usual rate of adapters: some times that of the whole model.
    "lora": _LIFTED,
    "relora": _LIFTED,
    "low_rank": {"block_scale": 1.0},
    "optax_galore": {**_LIFTED, "update_proj_gap": 500},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleFlags(options.ScheduleFlags):
    """The learning rate over the run."""

    #: Peak learning rate of embedding, norms and biases; above 0.
    learning_rate: Positive = 1e-4
    #: Learning rate of the block matrices, as a multiple of --learning-rate; above 0.
    #: None: 4 of adarankgrad, galore, optax_galore, ldadam, fira, apollo, sumo, lora
    #: and relora, whose updates are shorter, 1 of the others. It takes the place of
    #: GaLore's scale.
    block_scale: Positive | None = None
    #: Curve behind the warm-up: linear (a line down); cosine; wsd (warm-up, stable,
    #: decay: the peak, then a line down over --decay-fraction); constant.
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "linear"
    #: Steps of linear warm-up from zero, below the run's steps. None: 6 % of them.
    warmup_steps: Count | None = None
    #: The schedule ends at this fraction of the peak; 0 to 1. constant does not use it.
    final_learning_rate_fraction: Fraction = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneMethodFlags(options.OneMethodFlags):
    """Options that only some optimizers have; None: what the chosen one has."""

    #: Rank of the projection or of adapters, in columns; at least 1. None: 8. A matrix
    #: whose shorter side is not above it is not projected.
    rank: AtLeastOne | None = None
    #: Share of a gradient's squared norm that the rank may lose; in (0, 1). None:
    #: 0.3 of adarankgrad, the only one that has it.
    threshold: Inside | None = None
    #: Least rank in use, in columns; 1 to --rank. None: half of --rank for adarankgrad,
    #: the only one that has it.
    min_rank: AtLeastOne | None = None
    #: Weight of the past in the demand for columns, per refresh, which starts at
    #: --rank; 0 or more and below 1. 0: the last gradient alone decides. None: 0.5 of
    #: adarankgrad, the only one that has it.
    rank_smoothing: Decay | None = None
    #: Least steps between two refreshes of a basis; at least 1. None: 100 of
    #: adarankgrad, the only one that has it.
    min_refresh_interval: AtLeastOne | None = None
    #: Most steps between two refreshes of a basis; at least --min-refresh-interval.
    #: None: 200 of adarankgrad, the only one that has it.
    max_refresh_interval: AtLeastOne | None = None
    #: Steps between two refreshes of a basis, or restarts of relora; at least 1. None:
    #: 25 of vlorp and projfactor, 500 of galore and optax_galore, 200 of the others
    #: that have it (not adarankgrad, ldadam).
    update_proj_gap: AtLeastOne | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFlags(options.MemoryFlags):
    """What saves memory, and what it costs."""

    #: Free columns of the optimizer's state that no layer has wanted for four looks,
    #: but one (or an eighth of --rank): where this one is used too, columns grow again,
    #: up to --rank. With --block-state-bytes, spread them over the matrices by captured
    #: energy. The steps are compiled again then. Methods of a fixed rank use all
    #: columns, and nothing is freed.
    compact: bool = True
    #: Steps between two looks of --compact; at least 1.
    compact_every: AtLeastOne = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptions(
    MemoryFlags, OneMethodFlags, ScheduleFlags, options.OptimizerOptions
):
    """The flags of the optimizer; where None, the chosen optimizer has its own."""

    @property
    def most_columns(self) -> int | None:
        """To where --compact lets a leaf's columns grow again: --rank."""
        return self.rank


def with_tuning_defaults(flags: TuningOptions, *, steps: int) -> dict[str, Any]:
    """Returns the values of the flags that are None and that the optimizer uses.

    The sister of :func:`experiments.optim.options.with_defaults`.

    Args:
        flags: Of the run; ``flags.optimizer`` is a key of :data:`OPTIMIZERS`.
        steps: Length of the run.

    Example:
        >>> with_tuning_defaults(TuningOptions(optimizer="lora"), steps=200)
        {'warmup_steps': 12, 'rank': 8, 'block_scale': 4.0}
    """
    own = OPTIMIZERS[flags.optimizer].own
    rank = flags.rank or RANK
    ranks = options.rank_defaults(flags, rank, rank // 2, steps)
    return options.filled_in(
        flags,
        {
            "warmup_steps": round(_WARMUP * steps),
            **own,
            **TUNING[flags.optimizer],
            **{name: value for name, value in ranks.items() if name in own},
        },
    )
