"""The flags of the optimizer, and what each method has where they are silent."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from experiments.optim.methods import OPTIMIZERS
from experiments.ranges import (
    AtLeastOne,
    Count,
    Decay,
    Fraction,
    Halves,
    Inside,
    NotNegative,
    Positive,
)

# At the default rates a run of 40 steps on bytes of C4 jumps from a loss of 3.3 to 5.3
# behind a warm-up of 4 steps, a tenth, and to 4.3 behind 20; behind 25 it does not.
_LEAST_WARMUP = 30
_WSD_DECAY = 0.2

Rebase = Literal["abs", "clamp", "filled", "first", "keep", "ldadam", "square", "zero"]

_METHODS_HELP = "\n".join(
    [
        "Method of the block matrices (attention and MLP kernels). Norms always have "
        "AdamW; embedding and head what --vocabulary-optimizer says.",
        *(f"{name}: {method.help}" for name, method in OPTIMIZERS.items()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """What trains the parameters."""

    optimizer: Annotated[
        str,
        tyro.conf.arg(metavar="{" + ",".join(OPTIMIZERS) + "}", help=_METHODS_HELP),
    ] = "adarankgrad"
    #: Optimizer of embedding and head: adamw; low_bit (AdamW with its moments in 8
    #: bits); projected (the method of the block matrices); factored (Adafactor: a
    #: factored second moment, no first one).
    vocabulary_optimizer: Literal["adamw", "low_bit", "projected", "factored"] = "adamw"
    #: Decoupled decay per step, times the learning rate, of all but the norms; 0 or
    #: more.
    weight_decay: NotNegative = 0.0
    #: Decay of Adam's first moment per step; in [0, 1).
    b1: Decay = 0.9
    #: Decay of Adam's second moment per step; in [0, 1).
    b2: Decay = 0.999
    #: Added to the root of Adam's second moment; above 0.
    eps: Positive = 1e-8
    #: Largest global norm of the gradient; above 0. None: no clipping.
    clip_norm: Positive | None = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """The learning rate over the run."""

    #: Peak learning rate of embedding, head and norms; above 0.
    learning_rate: Positive = 8e-3
    #: Learning rate of the block matrices, as a multiple of --learning-rate; above 0.
    #: None: adamw, adafactor and stable_spam 0.125, adapters, frugal and foam 0.25,
    #: sumo 1, the others 0.5. It takes the place of GaLore's scale.
    block_scale: Positive | None = None
    #: Curve behind the warm-up: cosine; wsd (warm-up, stable, decay: the peak, then a
    #: line down over --decay-fraction); linear (a line down); constant.
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    #: Steps of linear warm-up from zero, below --steps. None: a tenth of --steps; at
    #: least 30, but at most two thirds of --steps.
    warmup_steps: Count | None = None
    #: Share of --steps that the decay of wsd takes, all that is behind the warm-up at
    #: most; in (0, 1). None: 0.2 of wsd, the
    #: only one that has it.
    decay_fraction: Inside | None = None
    #: The schedule ends at this fraction of the peak; 0 to 1. constant does not use it.
    final_learning_rate_fraction: Fraction = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneMethodFlags:
    """Options that only some optimizers have; None: what the chosen one has."""

    #: Rank of the projection, in columns; at least 1. None: a quarter of the hidden
    #: size, three eighths for adarankgrad, over --granularity. A matrix whose shorter
    #: side is not above it is not projected.
    rank: AtLeastOne | None = None
    #: Pieces that each row of a gradient is cut into before it is projected; at least
    #: 1. Moments take as much as for a rank of --rank times this. None: 4 of vlorp and
    #: projfactor, the only ones that have it.
    granularity: AtLeastOne | None = None
    #: Share of a gradient's squared norm that the rank may lose; in (0, 1). None:
    #: 0.0003 of adarankgrad, the only one that has it.
    threshold: Inside | None = None
    #: Least rank in use, in columns; 1 to --rank. None: seven eighths of --rank for
    #: adarankgrad, the only one that has it.
    min_rank: AtLeastOne | None = None
    #: Least rank in use at the end, in columns; 1 to --min-rank. The least rank falls
    #: in a line, from --min-rank at the start to this at step --min-rank-steps. None:
    #: the least rank stays. adarankgrad alone has it.
    final_min_rank: AtLeastOne | None = None
    #: Step at which the least rank has reached --final-min-rank; at least 1. None: two
    #: thirds of the run with --final-min-rank.
    min_rank_steps: AtLeastOne | None = None
    #: Weight of the past in the demand for columns, per refresh, which starts at
    #: --rank; 0 or more and below 1. 0: the last gradient alone decides. None: 0.5 of
    #: adarankgrad, the only one that has it.
    rank_smoothing: Decay | None = None
    #: Least steps between two refreshes of a basis; at least 1. None: 200 of
    #: adarankgrad, the only one that has it.
    min_refresh_interval: AtLeastOne | None = None
    #: Most steps between two refreshes of a basis; at least --min-refresh-interval.
    #: None: 300 of adarankgrad, the only one that has it.
    max_refresh_interval: AtLeastOne | None = None
    #: Steps between two refreshes of a basis, or restarts of relora; at least 1. None:
    #: 25 of vlorp and projfactor, 200 of the others that have it (not adarankgrad,
    #: ldadam).
    update_proj_gap: AtLeastOne | None = None
    #: Basis: svd, singular vectors; range_finder, nearly these by a few products; dct,
    #: columns of a cosine transform, of which the state has the numbers alone. None:
    #: svd of galore, range_finder of adarankgrad, sumo and low_rank_muon, the only
    #: ones that have it.
    basis: Literal["svd", "range_finder", "dct"] | None = None
    #: Times that a sketched basis is sharpened by the gradient; a multiple of 0.5, 0 or
    #: more. None: 2 of adarankgrad, 1 of sumo and low_rank_muon, the only ones that
    #: have it.
    power_iterations: Halves | None = None
    #: Rule by which moments follow a new basis. None: square of adarankgrad, sumo and
    #: low_rank_muon, the only ones that have it.
    rebase: Rebase | None = None
    #: Side of each matrix that is projected. None: short of adarankgrad and galore, the
    #: only ones that have it.
    side: Literal["short", "long"] | None = None
    #: Decay of the momentum that is orthogonalized, per step; in [0, 1). None: 0.95 of
    #: muon, sumo and low_rank_muon, the only ones that have it. 0: muon has no state.
    momentum: Decay | None = None
    #: Weight of what lies outside the subspace, beside what lies inside; 0 or more.
    #: None: 4 of low_rank_muon (the last gradient, beside the momentum), 1 of frugal
    #: and 0 of adarankgrad (signs, beside Adam's update), the only ones that have it.
    #: adarankgrad needs full gradients above 0.
    residual: NotNegative | None = None
    #: Decay of the squares that bring all outputs of a matrix to updates of one size,
    #: per step; in [0, 1), 0.95 in NorMuon. None: they keep their sizes. muon and
    #: low_rank_muon have it.
    neuron_decay: Decay | None = None
    #: Steps between two resets of Adam's moments; 0 or more. 0: never. None: 500 of
    #: stable_spam, the only one that has it.
    reset_every: Count | None = None
    #: Level l of folds: 2^l inputs that follow each other share their moments; 0 or
    #: more. A matrix has the largest level up to it whose 2^l divides its inputs. None:
    #: 2 of foam, the only one that has it.
    fold_level: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """What saves memory, and what it costs."""

    #: Recompute each layer in the backward pass: less memory, about a third slower.
    remat: bool = False
    #: Micro-batches that a batch is cut into, one after the other: less memory for the
    #: same update; a divisor of --batch-size. Their gradients are added up inside the
    #: subspaces.
    accumulate: AtLeastOne = 1
    #: Gradients of projected matrices: subspace, computed inside their subspaces (see
    #: --refresh; norms, and clipping by them, then see the projected gradients); or
    #: full. Methods without subspaces, or that look at more than them
    #: (fira, frugal, apollo, ldadam, low_rank_muon, optax_galore), have full ones
    #: anyway.
    gradients: Literal["subspace", "full"] = "subspace"
    #: With gradients inside subspaces: what computed bases are renewed from: a sketch,
    #: so that no step holds the full gradient of a projected matrix; or full gradients.
    refresh: Literal["sketch", "full"] = "full"
    #: Bits of the moments of the block matrices' method: 8, in blocks of 256 values
    #: (arrays of fewer than 4,096 values stay in float32). None: float32.
    moment_bits: Literal[8] | None = None
    #: Bits of the projections of the block matrices: 8 or 4. None: float32.
    basis_bits: Literal[8, 4] | None = None
    #: Rounding of updated bfloat16 parameters (--param-dtype): stochastic, which is
    #: right on average, or nearest, which drops small updates.
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    #: Bytes of the state of the block matrices, like 600MB, in the place of --rank: the
    #: largest rank that fits, of a method that stores its bases. adarankgrad has no
    #: --threshold then, but for its refreshes. None: --rank decides.
    block_state_bytes: str | None = None
    #: Free columns of the optimizer's state that have not been wanted for four looks,
    #: or, with --block-state-bytes, spread them over the matrices by captured energy.
    #: The step is compiled again then. Freed columns do not come back: no rank rises
    #: above those that are left.
    compact: bool = False
    #: Steps between two looks of --compact; at least 1.
    compact_every: AtLeastOne = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(MemoryFlags, OneMethodFlags, ScheduleFlags, OptimizerFlags):
    """The flags of the optimizer; where None, the chosen optimizer has its own."""

    @property
    def most_columns(self) -> int | None:
        """To where --compact lets a leaf's columns grow again. None: freed for good."""
        return None


def default_warmup(steps: int) -> int:
    """Returns a tenth of the steps; at least 30, but at most two thirds of them.

    Example:
        >>> [default_warmup(steps) for steps in (800, 300, 100, 40, 5)]
        [80, 30, 30, 26, 3]
    """
    return max(steps // 10, min(_LEAST_WARMUP, 2 * steps // 3))


def with_defaults(
    options: OptimizerOptions, *, steps: int, hidden_size: int
) -> dict[str, Any]:
    """Returns the values of the options that are None and that the optimizer uses.

    Args:
        options: The flags; ``options.optimizer`` is a key of :data:`OPTIMIZERS`.
        steps: Length of the run.
        hidden_size: Of the model; the default rank is a share of it.
    """
    method = OPTIMIZERS[options.optimizer]
    granularity = method.own.get("granularity") and options.granularity
    granularity = granularity or method.own.get("granularity", 1)
    rank = options.rank or max(1, int(method.rank_share * hidden_size) // granularity)
    ranks = rank_defaults(options, rank, 7 * rank // 8, steps)
    return filled_in(
        options,
        {
            "warmup_steps": default_warmup(steps),
            "block_scale": method.block_scale,
            **method.own,
            **{name: value for name, value in ranks.items() if name in method.own},
        },
    )


def rank_defaults(
    options: OptimizerOptions, rank: int, least: int, steps: int
) -> dict[str, int]:
    """Returns the defaults of what decides about ranks, of methods that have it.

    Args:
        options: The flags.
        rank: Capacity.
        least: Least rank in use; below 1 stands for 1.
        steps: Length of the run.
    """
    found = {"rank": rank, "min_rank": max(1, least)}
    if options.final_min_rank is not None:
        found["min_rank_steps"] = max(1, 2 * steps // 3)
    return found


def filled_in(options: OptimizerOptions, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of the options that are None, fitted to those that are not.

    Args:
        options: The flags.
        defaults: By name, what the chosen optimizer has where they are silent.
    """
    defaults = dict(defaults)
    if options.schedule == "wsd":
        defaults["decay_fraction"] = _WSD_DECAY
    if "min_refresh_interval" in defaults and options.max_refresh_interval:
        least = min(defaults["min_refresh_interval"], options.max_refresh_interval)
        defaults["min_refresh_interval"] = least
    if "max_refresh_interval" in defaults and options.min_refresh_interval:
        most = max(defaults["max_refresh_interval"], options.min_refresh_interval)
        defaults["max_refresh_interval"] = most
    if options.basis in ("svd", "dct"):
        defaults.pop("power_iterations", None)
    if options.block_state_bytes is not None:
        # They take the place of the ranks.
        defaults |= {"rank": None, "min_rank": None}
    return {k: v for k, v in defaults.items() if getattr(options, k) is None}
