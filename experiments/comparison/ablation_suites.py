"""Suites that vary methods, at their rates of cpu-small, and search nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import lowrank_optax
from experiments.comparison.pretraining_suites import (
    CPU_SMALL,
    FIXED_INTERVAL,
    variant,
)
from experiments.comparison.suite import Suite

# Without a limit on the time.
_ON_CONVERGENCE = {"min_refresh_interval": 200, "max_refresh_interval": 1_000}
_STRONGEST = (
    *("adamw", "adarankgrad", "muon", "normuon"),
    "low_rank_muon dct r=104 8 bits",
)


def _ablation(
    description: str,
    like: str,
    variants: Mapping[str, Mapping[str, Any]],
    seeds: tuple[int, ...] = (0, 1),
) -> Suite:
    """Returns variants of a method, at its rates and with nothing searched."""
    return Suite(
        description,
        CPU_SMALL,
        tuple(
            dataclasses.replace(variant(like, name, **flags), name=name)
            for name, flags in variants.items()
        ),
        seeds=seeds,
        search=1,
    )


def _of_all(description: str, variants: Mapping[str, Mapping[str, Any]]) -> Suite:
    """Returns variants of the strongest methods, all alike, each at its own rates."""
    return Suite(
        description,
        CPU_SMALL,
        tuple(
            variant(like, name, **flags)
            for name, flags in variants.items()
            for like in _STRONGEST
        ),
        seeds=(0, 1),
        search=1,
    )


ABLATION_SUITES: dict[str, Suite] = {
    "ablation-adaptive": _ablation(
        "what adapts: rank, refresh, both or neither (AdaRankGrad's Tables 5 and 6)",
        "adarankgrad",
        {
            "rank and refresh": {"threshold": 0.05, "min_rank": 4, **_ON_CONVERGENCE},
            "rank only": {"threshold": 0.05, "min_rank": 4, **FIXED_INTERVAL},
            "refresh only": {"min_rank": 48, **_ON_CONVERGENCE},
            "neither": {"min_rank": 48, **FIXED_INTERVAL},
        },
    ),
    "ablation-threshold": _ablation(
        "the share of a gradient that the rank may lose (AdaRankGrad's Figure 5)",
        "adarankgrad",
        {
            f"threshold {threshold:g}": {"threshold": threshold, "min_rank": 1}
            for threshold in (0.3, 0.1, 0.03, 0.01)
        },
    ),
    "ablation-rebase": _ablation(
        "how the moments follow a new basis",
        "adarankgrad",
        {
            rule: {
                "rebase": rule,
                "min_refresh_interval": 50,
                "max_refresh_interval": 50,
            }
            for rule in lowrank_optax.REBASE_RULES
        },
    ),
    "ablation-rebase-default": _ablation(
        "how the moments follow a new basis, at the method's own intervals",
        "adarankgrad",
        {rule: {"rebase": rule} for rule in ("square", "filled")},
        seeds=(0, 1, 2),
    ),
    "ablation-side": _ablation(
        "which side of a matrix is projected",
        "galore",
        {side: {"side": side} for side in ("short", "long")},
    ),
    "ablation-interval": _ablation(
        "updates between two bases",
        "galore",
        {
            f"every {gap}": {"update_proj_gap": gap}
            for gap in (10, 25, 50, 100, 200, 600)
        },
    ),
    "ablation-granularity": _ablation(
        "granularity c at the same c r",
        "vlorp",
        {
            f"c={c} r={r}": {"granularity": c, "rank": r}
            for c, r in ((1, 32), (4, 8), (16, 2))
        },
    ),
    "ablation-schedule": _of_all(
        "how the learning rate falls; without a name: a cosine to a tenth",
        {
            "cosine to zero": {"final_learning_rate_fraction": 0.0},
            "line to zero": {"schedule": "linear", "final_learning_rate_fraction": 0.0},
            "wsd to zero": {"schedule": "wsd", "final_learning_rate_fraction": 0.0},
        },
    ),
    "ablation-decay": _of_all(
        "weight decay; without a name: none",
        {f"decay {decay:g}": {"weight_decay": decay} for decay in (0.01, 0.1)},
    ),
}
