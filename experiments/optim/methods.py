"""The methods by name: what trains the block matrices.

Adding one is one entry of :data:`OPTIMIZERS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from experiments.optim.unstacked import unstacked


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer of the block matrices.

    Attributes:
        make: Called with the learning rate, Adam's b1, b2 and eps, weight_decay, seed
            and the own options by name; leaves are stacks of matrices (L, n, m).
        block_scale: Tuned default of --block-scale.
        own: Default of each option that only some methods have, and this one does;
            rank's and min_rank's None is filled in by
            :func:`experiments.optim.options.with_defaults`.
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


def _ldadam(learning_rate, **options):
    return lowrank_optax.ldadam(
        learning_rate, start=lowrank_optax.exact_svd(), **options
    )


def _fira(learning_rate, **options):
    return lowrank_optax.fira(learning_rate, basis=lowrank_optax.exact_svd(), **options)


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


def adafactor(learning_rate, *, weight_decay, **others):
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
    "ldadam": Method(_ldadam, 0.5, {"rank": None}),
    "fira": Method(_fira, 0.5, {"rank": None, "update_proj_gap": 200}),
    "apollo": Method(lowrank_optax.apollo, 0.5, {"rank": None, "update_proj_gap": 200}),
    "apollo_mini": Method(_apollo_mini, 0.5, {"update_proj_gap": 200}),
    "muon": Method(_muon, 0.5, {"momentum": 0.95}),
    "adafactor": Method(adafactor, 0.125),
    "lora": Method(_of_factors, 0.25, {"rank": None}, adapters="lora"),
    "relora": Method(
        _relora, 0.25, {"rank": None, "update_proj_gap": 200}, adapters="relora"
    ),
    "low_rank": Method(_of_factors, 0.25, {"rank": None}, adapters="low_rank"),
    "optax_galore": Method(_optax_galore, 0.5, {"rank": None, "update_proj_gap": 200}),
}
# Every option that some method has for itself.
OWN_OPTIONS = frozenset(name for method in OPTIMIZERS.values() for name in method.own)
