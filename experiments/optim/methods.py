"""The optimizers by name: a method for the block matrices, AdamW for the rest.

Adding one is one entry of :data:`OPTIMIZERS`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import lowrank_optax
from experiments.optim.skip_nonfinite import skip_nonfinite
from experiments.optim.unstacked import unstacked

Rebase = Literal["abs", "clamp", "first", "keep", "ldadam", "square", "zero"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer of the block matrices.

    Attributes:
        make: Called with the learning rate, Adam's b1, b2 and eps, weight_decay, seed
            and the own options by name; leaves are stacks of matrices (L, n, m).
        block_scale: Tuned default of --block-scale.
        own: Default of each option that only some methods have, and this one does;
            rank's and min_rank's None is filled in by :func:`with_defaults`.
        takes_subspace_gradients: Whether gradients inside the subspaces do, but for
            steps that renew a basis.
        rank_share: Default of --rank, as a share of the hidden size.
        adapters: Parameterisation of the block matrices whose factors it trains, of
            :mod:`experiments.model.adapters`. None: it trains the matrices.
    """

    make: Callable[..., optax.GradientTransformation]
    block_scale: float
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes_subspace_gradients: bool = False
    rank_share: float = 0.25
    adapters: Literal["lora", "relora", "low_rank"] | None = None


def _adamw(learning_rate, *, seed, **adam):
    del seed
    return optax.adamw(learning_rate, **adam)


def _of_factors(learning_rate, *, rank, **others):
    del rank
    return _adamw(learning_rate, **others)


def _relora(learning_rate, *, update_proj_gap, **others):
    """AdamW whose rate is warmed up again, over a tenth of the gap, at each restart."""
    warmup = max(1, update_proj_gap // 10)

    def rate(count):
        since = count % update_proj_gap
        share = jnp.minimum((since + 1) / warmup, 1)
        return learning_rate(count) * jnp.where(count < update_proj_gap, 1, share)

    return _of_factors(rate, **others)


def _adarankgrad(
    learning_rate,
    *,
    rank,
    threshold,
    min_rank,
    min_refresh_interval,
    max_refresh_interval,
    power_iterations,
    **options,
):
    if isinstance(rank, int):
        rank = lowrank_optax.energy_rank(rank, threshold, min_rank)
    return lowrank_optax.adarankgrad(
        learning_rate,
        rank=rank,
        refresh=lowrank_optax.on_convergence(
            min_refresh_interval, max_refresh_interval, (1 - threshold) ** 0.5
        ),
        basis=lowrank_optax.range_finder(power_iterations=power_iterations),
        **options,
    )


def _galore(learning_rate, **options):
    return lowrank_optax.galore(learning_rate, scale=1.0, **options)


def _optax_galore(
    learning_rate, *, rank, update_proj_gap, b1, b2, eps, weight_decay, seed
):
    del seed
    galore = optax.contrib.galore(
        learning_rate,
        rank=rank,
        update_proj_gap=update_proj_gap,
        base_optimizer=optax.scale_by_adam(b1, b2, eps),
        weight_decay=weight_decay,
    )
    return unstacked(galore)


def _fira(learning_rate, **options):
    return lowrank_optax.fira(learning_rate, scale=1.0, **options)


def _apollo_mini(learning_rate, **options):
    return lowrank_optax.apollo(
        learning_rate, 1, scale=128**0.5, by_matrix=True, **options
    )


def _vlorp(
    learning_rate, *, rank, granularity, update_proj_gap, b1, b2, eps, **options
):
    return lowrank_optax.vlorp(
        learning_rate,
        rank,
        granularity,
        optax.scale_by_adam(b1, b2, eps),
        refresh=lowrank_optax.every(update_proj_gap),
        **options,
    )


def _projfactor(learning_rate, *, rank, granularity, update_proj_gap, **options):
    return lowrank_optax.projfactor(
        learning_rate,
        rank,
        granularity,
        refresh=lowrank_optax.every(update_proj_gap),
        **options,
    )


def _adafactor(learning_rate, *, weight_decay, **others):
    """Adafactor without relative step sizes, with decoupled weight decay."""
    del others
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(learning_rate, *, momentum, weight_decay, **others):
    del others
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return optax.contrib.muon(
        learning_rate,
        beta=momentum,
        weight_decay=weight_decay,
        # Each leaf is a stack of matrices.
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda leaf: numbers, params
        ),
        consistent_rms=0.2,
    )


def _orthogonalized(make):
    """Returns the method of ``sumo`` or ``low_rank_muon``, with Muon's options."""

    def method(
        learning_rate,
        *,
        rank,
        momentum,
        update_proj_gap,
        power_iterations,
        weight_decay,
        b1,
        b2,
        eps,
        **options,
    ):
        del b1, b2, eps
        return make(
            learning_rate,
            rank,
            momentum,
            weight_decay,
            refresh=lowrank_optax.every(update_proj_gap),
            basis=lowrank_optax.range_finder(power_iterations=power_iterations),
            **options,
        )

    return method


_ORTHOGONALIZED = {
    "rank": None,
    "update_proj_gap": 200,
    "momentum": 0.95,
    "power_iterations": 1,
    "rebase": "square",
}
_VARIOUS_GRAINED = {"rank": None, "granularity": 4, "update_proj_gap": 25}

OPTIMIZERS: dict[str, Method] = {
    "adamw": Method(_adamw, 0.125),
    "adarankgrad": Method(
        _adarankgrad,
        0.5,
        rank_share=0.375,
        takes_subspace_gradients=True,
        own={
            "rank": None,
            "threshold": 0.0003,
            "min_rank": None,
            "min_refresh_interval": 200,
            "max_refresh_interval": 300,
            "power_iterations": 2,
            "rebase": "square",
            "side": "short",
        },
    ),
    "galore": Method(
        _galore, 0.5, {"rank": None, "update_proj_gap": 200, "side": "short"}, True
    ),
    "vlorp": Method(_vlorp, 0.5, _VARIOUS_GRAINED, True),
    "projfactor": Method(_projfactor, 0.5, _VARIOUS_GRAINED, True),
    "sumo": Method(_orthogonalized(lowrank_optax.sumo), 1.0, _ORTHOGONALIZED, True),
    "low_rank_muon": Method(
        _orthogonalized(lowrank_optax.low_rank_muon),
        0.5,
        {**_ORTHOGONALIZED, "residual": 4.0},
    ),
    "ldadam": Method(lowrank_optax.ldadam, 0.5, {"rank": None}),
    "fira": Method(_fira, 0.5, {"rank": None, "update_proj_gap": 200}),
    "apollo": Method(lowrank_optax.apollo, 0.5, {"rank": None, "update_proj_gap": 200}),
    "apollo_mini": Method(_apollo_mini, 0.5, {"update_proj_gap": 200}),
    "muon": Method(_muon, 0.5, {"momentum": 0.95}),
    "adafactor": Method(_adafactor, 0.125),
    "lora": Method(_of_factors, 0.25, {"rank": None}, adapters="lora"),
    "relora": Method(
        _relora, 0.25, {"rank": None, "update_proj_gap": 200}, adapters="relora"
    ),
    "low_rank": Method(_of_factors, 0.25, {"rank": None}, adapters="low_rank"),
    "optax_galore": Method(_optax_galore, 0.5, {"rank": None, "update_proj_gap": 200}),
}
# Every option that some method has for itself.
OWN_OPTIONS = frozenset(name for method in OPTIMIZERS.values() for name in method.own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The flags of the optimizer; where None, the chosen optimizer has its own."""

    #: Method of the block matrices (attention and MLP kernels). Norms always have
    #: AdamW; embedding and head what --vocabulary says.
    optimizer: Annotated[
        str, tyro.conf.arg(metavar="{" + ",".join(OPTIMIZERS) + "}")
    ] = "adarankgrad"
    #: Optimizer of embedding and head: adamw; low_bit (AdamW with its moments in 8
    #: bits); projected (the method of the block matrices); factored (Adafactor: a
    #: factored second moment, no first one).
    vocabulary: Literal["adamw", "low_bit", "projected", "factored"] = "adamw"
    #: Gradients of projected matrices: subspace, computed inside their subspaces, but
    #: for steps that renew a basis (norms, and clipping by them, then see the projected
    #: gradients); or full. Methods without subspaces, or that look at more than them
    #: (fira, apollo, ldadam, low_rank_muon, optax_galore), have full ones anyway.
    gradients: Literal["subspace", "full"] = "subspace"
    #: With gradients inside subspaces: renew all bases that are due on the same step,
    #: which holds full gradients of everything; or apart, one leaf's a step, which
    #: holds that leaf's only and compiles a step for each leaf.
    refresh: Literal["together", "apart"] = "together"
    #: Bits of the moments of the block matrices' method: 8, in blocks of 256 values
    #: (arrays of fewer than 4,096 values stay in float32). None: float32.
    moment_bits: Literal[8] | None = None
    #: Bits of the projections of the block matrices: 8 or 4. None: float32.
    basis_bits: Literal[8, 4] | None = None
    #: Rounding of updated bfloat16 parameters (--param-dtype): stochastic, which is
    #: right on average, or nearest, which drops small updates.
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    #: Peak learning rate of embedding, head and norms; above 0.
    learning_rate: float = 8e-3
    #: Learning rate of the block matrices, as a multiple of --learning-rate; above 0.
    #: None: adamw and adafactor 0.125, adapters 0.25, sumo 1, the others 0.5. It takes
    #: the place of GaLore's scale.
    block_scale: float | None = None
    #: Steps of linear warm-up from zero, below --steps. None: a tenth of --steps.
    warmup_steps: int | None = None
    #: The cosine ends at this fraction of the peak; 0 to 1.
    final_learning_rate_fraction: float = 0.1
    #: Decoupled decay per step, times the learning rate, of all but the norms; 0 or
    #: more.
    weight_decay: float = 0.0
    #: Decay of Adam's first moment per step; in [0, 1).
    b1: float = 0.9
    #: Decay of Adam's second moment per step; in [0, 1).
    b2: float = 0.999
    #: Added to the root of Adam's second moment; above 0.
    eps: float = 1e-8
    #: Largest global norm of the gradient; above 0. None: no clipping.
    clip_norm: float | None = 1.0
    #: Rank of the projection, in columns; at least 1. None: a quarter of the hidden
    #: size, three eighths for adarankgrad, over --granularity. A matrix whose shorter
    #: side is not above it is not projected.
    rank: int | None = None
    #: Bytes of the state of the block matrices, like 600MB, in the place of --rank: the
    #: largest rank that fits, of galore and adarankgrad (which then has no --threshold,
    #: but for its refreshes). None: --rank decides.
    block_state_bytes: str | None = None
    #: Pieces that each row of a gradient is cut into before it is projected; at least
    #: 1. Moments take as much as for a rank of --rank times this. None: 4 of vlorp and
    #: projfactor, the only ones that have it.
    granularity: int | None = None
    #: Share of a gradient's squared norm that the rank may lose; in (0, 1). None:
    #: 0.0003 of adarankgrad, the only one that has it.
    threshold: float | None = None
    #: Least rank in use, in columns; 1 to --rank. None: seven eighths of --rank for
    #: adarankgrad, the only one that has it.
    min_rank: int | None = None
    #: Least steps between two refreshes of a basis; at least 1. None: 200 of
    #: adarankgrad, the only one that has it.
    min_refresh_interval: int | None = None
    #: Most steps between two refreshes of a basis; at least --min-refresh-interval.
    #: None: 300 of adarankgrad, the only one that has it.
    max_refresh_interval: int | None = None
    #: Steps between two refreshes of a basis, or restarts of relora; at least 1. None:
    #: 25 of vlorp and projfactor, 200 of the others that have it (not adarankgrad,
    #: ldadam).
    update_proj_gap: int | None = None
    #: Times that a sketched basis is sharpened by the gradient; a multiple of 0.5, 0 or
    #: more. None: 2 of adarankgrad, 1 of sumo and low_rank_muon, the only ones that
    #: have it.
    power_iterations: float | None = None
    #: Rule by which moments follow a new basis. None: square of adarankgrad, sumo and
    #: low_rank_muon, the only ones that have it.
    rebase: Rebase | None = None
    #: Side of each matrix that is projected. None: short of adarankgrad and galore, the
    #: only ones that have it.
    side: Literal["short", "long"] | None = None
    #: Decay of the momentum that is orthogonalized, per step; in [0, 1). None: 0.95 of
    #: muon, sumo and low_rank_muon, the only ones that have it.
    momentum: float | None = None
    #: Weight of the last gradient outside the subspace, beside the momentum inside; 0
    #: or more. None: 4 of low_rank_muon, the only one that has it.
    residual: float | None = None


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
    defaults = {
        "warmup_steps": steps // 10,
        "block_scale": method.block_scale,
        **method.own,
    }
    if "rank" in method.own:
        defaults["rank"] = rank
    if "min_refresh_interval" in method.own and options.max_refresh_interval:
        least = min(method.own["min_refresh_interval"], options.max_refresh_interval)
        defaults["min_refresh_interval"] = least
    if "max_refresh_interval" in method.own and options.min_refresh_interval:
        most = max(method.own["max_refresh_interval"], options.min_refresh_interval)
        defaults["max_refresh_interval"] = most
    if "min_rank" in method.own:
        defaults["min_rank"] = max(1, 7 * rank // 8)
    return {k: v for k, v in defaults.items() if getattr(options, k) is None}


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Returns the learning rate of embedding, head and norms by update, from 0 on.

    A linear warm-up that gives the first update a rate above zero, then a cosine that
    reaches its end at the last update.
    """
    peak = options.learning_rate
    curve = optax.warmup_cosine_decay_schedule(
        0.0,
        peak,
        options.warmup_steps or 0,
        steps,
        peak * options.final_learning_rate_fraction,
    )
    return lambda count: curve(count + 1)


def build_optimizer(
    options: OptimizerOptions,
    schedule: optax.Schedule,
    seed: int = 0,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Returns clipping, then the method for the block matrices and AdamW for the rest.

    A gradient that is not finite changes neither parameters nor state; the state's
    ``notfinite_count`` and ``total_notfinite`` count them. With micro-batches, the
    norm that is clipped is that of their mean in the subspaces.

    Args:
        options: The flags, with :func:`with_defaults` filled in.
        schedule: Learning rate of the rest; the blocks' is ``block_scale`` times it.
        seed: Seed of what the method draws.
        accumulate: Micro-batches per update; above 1 the result is a
            ``lowrank_optax.Accumulation``.
    """
    method = OPTIMIZERS[options.optimizer]
    scale = method.block_scale if options.block_scale is None else options.block_scale
    own = {name: getattr(options, name) for name in method.own}
    if options.block_state_bytes is not None:
        own["rank"] = lowrank_optax.budget(options.block_state_bytes)
    adam: dict[str, Any] = {"b1": options.b1, "b2": options.b2, "eps": options.eps}
    decay: dict[str, Any] = {"weight_decay": options.weight_decay}

    def of_method(rate):
        made = method.make(rate, seed=seed, **adam, **decay, **own)
        if options.moment_bits is None and options.basis_bits is None:
            return made
        return lowrank_optax.low_bit(made, options.moment_bits, options.basis_bits)

    adamw = optax.adamw(schedule, **adam, **decay)
    vocabulary: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: adamw,
        "low_bit": lambda: lowrank_optax.low_bit(adamw),
        "projected": lambda: of_method(schedule),
        "factored": lambda: _adafactor(schedule, **decay),
    }
    groups: dict[Hashable, optax.GradientTransformation] = {
        "blocks": of_method(lambda count: scale * schedule(count)),
        "rest": vocabulary[options.vocabulary](),
        "norms": optax.adamw(schedule, **adam, weight_decay=0.0),
        "frozen": optax.set_to_zero(),
    }
    grouped = optax.partition(groups, parameter_groups)
    if options.rounding == "stochastic":
        grouped = optax.chain(grouped, lowrank_optax.stochastic_rounding(seed))
    if options.clip_norm is not None:
        grouped = optax.chain(optax.clip_by_global_norm(options.clip_norm), grouped)
    tx = skip_nonfinite(grouped)
    return lowrank_optax.accumulate(tx, accumulate) if accumulate > 1 else tx


def parameter_groups(params: Any) -> Any:
    """Returns a tree like ``params`` of "blocks", "norms", "rest" or "frozen".

    "blocks" are the stacked matrices (L, n, m) of attention and MLP, or their adapters;
    the matrices are "frozen" then.
    """

    def group(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name:
            return "norms"
        if name.startswith("adapters/"):
            return "blocks"
        is_matrix = "blocks/" in name and len(leaf.shape) == 3
        if is_matrix and name.startswith("model/"):
            return "frozen"
        return "blocks" if is_matrix else "rest"

    return jax.tree_util.tree_map_with_path(group, params)
