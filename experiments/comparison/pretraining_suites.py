"""The suites that pre-train: methods, data and searches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.comparison.suite import Contender, Suite
from experiments.model.shape import MODELS


def _contender(name: str, block_scale: float, rate: float = 8e-3, **flags: Any):
    return Contender(name, {"optimizer": name, **flags}, block_scale, rate)


def variant(like: str, change: str, **flags: Any) -> Contender:
    """Returns a method of cpu-small with some flags changed, at that one's rates."""
    (method,) = (contender for contender in _METHODS if contender.name == like)
    flags = {**method.flags, **flags}
    return dataclasses.replace(method, name=f"{like} {change}", flags=flags, like=like)


_8_BITS = {"moment_bits": 8, "vocabulary_optimizer": "low_bit"}
_SMALL_STATE = {"moment_bits": 8, "basis_bits": 8, "vocabulary_optimizer": "low_bit"}


def _dct(optimizer: str, rank: int) -> dict[str, Any]:
    """Returns flags of a method in columns of a cosine transform, in 8 bits."""
    return {"optimizer": optimizer, "basis": "dct", "rank": rank, **_8_BITS}


def _momentum_of_dct(rank: int) -> dict[str, Any]:
    return {**_dct("low_rank_muon", rank), "neuron_decay": 0.95}


FIXED_INTERVAL = {"min_refresh_interval": 200, "max_refresh_interval": 200}
_SIGNS_OUTSIDE = {
    "optimizer": "adarankgrad",
    "residual": 1.0,
    "min_rank": 48,
    **FIXED_INTERVAL,
}


# Searches start at the best rates of a few earlier runs. The default rank is a quarter
# of the hidden size, 32; for adarankgrad 48.
_METHODS = (
    _contender("adamw", 0.125),
    _contender("muon", 0.5),
    _contender("optax_galore", 0.5),
    _contender("adarankgrad", 0.25, 16e-3),
    _contender("sumo", 1.0),
    _contender("low_rank_muon", 0.5, 16e-3),
    _contender("galore", 0.25, 16e-3),
    _contender("fira", 0.5, 16e-3),
    _contender("apollo", 0.25, 16e-3),
    _contender("adafactor", 0.03125, 16e-3),
    _contender("vlorp", 0.25, 16e-3),
    _contender("projfactor", 0.25, 16e-3),
    # With the authors' decays, because the basis follows the momentum too.
    _contender("ldadam", 0.25, 16e-3, b1=0.908, b2=0.99),
    _contender("apollo_mini", 0.25, 16e-3),
    _contender("stable_spam", 0.125, 8e-3),
    _contender("scale", 0.5, 16e-3),
    _contender("frugal", 0.25, 16e-3),
    _contender("foam", 0.25, 16e-3),
    _contender("normuon", 0.25, 16e-3, optimizer="muon", neuron_decay=0.95),
    _contender("muon without momentum", 0.5, 16e-3, optimizer="muon", momentum=0.0),
    _contender("adarankgrad signs", 0.25, 16e-3, **_SIGNS_OUTSIDE),
    _contender("lora", 0.125, 16e-3),
    _contender("relora", 0.125, 16e-3),
    _contender("low_rank", 0.125, 16e-3),
    _contender("low_rank_muon dct r=104 8 bits", 0.25, 32e-3, **_momentum_of_dct(104)),
    _contender("low_rank_muon dct r=16 8 bits", 0.25, 32e-3, **_momentum_of_dct(16)),
    _contender("sumo dct r=104 8 bits", 0.25, 32e-3, **_dct("sumo", 104)),
    # The state takes as many bytes as adarankgrad's.
    _contender("optax_galore r=57", 0.25, 16e-3, optimizer="optax_galore", rank=57),
    _contender("sumo r=64 8 bits", 1.0, optimizer="sumo", rank=64, **_SMALL_STATE),
)
# Variants, at the rates of the method that they vary.
_VARIANTS = (
    # Where the gradients do not ask for them, half of the columns are freed in steps.
    variant(
        "adarankgrad signs",
        "falling",
        threshold=0.05,
        final_min_rank=22,
        compact=True,
    ),
    variant("adamw", "8 bits", **_8_BITS),
    variant("galore", "8 bits", **_8_BITS),
    variant("adarankgrad", "8 bits", **_8_BITS),
    variant("sumo", "8 bits", **_SMALL_STATE),
    variant("low_rank_muon", "8 bits", **_SMALL_STATE),
    variant("sumo", "r=64", rank=64),
    variant("low_rank_muon", "r=64 8 bits", rank=64, **_SMALL_STATE),
)

CPU_SMALL = {
    "model": "tiny",
    "steps": 600,
    "eval_every": 300,
    "eval_tokens": 131_072,
    "sample_tokens": 0,
}


# 4,096 tokens; a quarter of them stays in the cache of a core, which is a third faster.
_BATCHES = {"batch_size": 32, "accumulate": 4}
# Ten tokens for each of 0.86 M parameters.
_CPU_LONG = {**CPU_SMALL, **_BATCHES, "steps": 2_100, "eval_every": 700}
# One token for each of 4.9 M parameters.
_CPU_WIDE = {**_CPU_LONG, "model": "5m", "steps": 1_250, "eval_every": 625}

# Needs an accelerator, a tokenizer, and text with 105 M tokens for each run.
_C4_60M = {
    "model": "60m",
    "steps": 3_200,
    "batch_size": 128,
    "sequence_length": 256,
    "compute_dtype": "bfloat16",
    "rank": 128,
    "eval_every": 400,
    "eval_tokens": 262_144,
    "sample_tokens": 0,
}


def _in_subspaces(hidden: int) -> dict[str, dict[str, Any]]:
    """Returns name -> flags of methods whose ranks are shares of the width."""
    half, most, few = hidden // 2, 13 * hidden // 16, hidden // 8
    stored = {"rank": half, **_SMALL_STATE}
    return {
        f"sumo r={half} 8 bits": {"optimizer": "sumo", **stored},
        f"low_rank_muon r={half} 8 bits": {"optimizer": "low_rank_muon", **stored},
        f"low_rank_muon dct r={most} 8 bits": _momentum_of_dct(most),
        f"low_rank_muon dct r={few} 8 bits": _momentum_of_dct(few),
        f"sumo dct r={most} 8 bits": _dct("sumo", most),
    }


def _longer(description: str, flags: Mapping[str, Any]) -> Suite:
    """Returns a suite of the strongest methods, each as one would use it."""
    names = ("adamw", "stable_spam", "muon", "normuon", "scale", "optax_galore")
    names += ("galore", "adarankgrad")
    ours, small = (
        _in_subspaces(MODELS[model]["hidden_size"])
        for model in (flags["model"], CPU_SMALL["model"])
    )
    contenders = (
        *(contender for contender in _METHODS if contender.name in names),
        *(
            # The same share of the width has the rates of cpu-small, if any are taken.
            Contender(name, x, 0.25, 32e-3, like=like if like != name else None)
            for (name, x), like in zip(ours.items(), small, strict=True)
        ),
    )
    return Suite(description, flags, contenders, seeds=(0, 1), search=16)


def _published(model: str, steps: int, rank: int, adamw_rate: float) -> Suite:
    """Returns a table of the papers: GaLore's batch, schedule, rates and ranks."""
    projected: dict[str, Any] = {"rank": rank}
    rate = 0.01
    return Suite(
        f"{model} on streamed C4 with GaLore's published settings",
        {
            "model": model,
            "steps": steps,
            "batch_size": 512,
            "sequence_length": 256,
            "compute_dtype": "bfloat16",
            "eval_every": 1_000,
            "eval_tokens": 10_000_000,
            "sample_tokens": 0,
        },
        (
            _contender("adamw", 1.0, adamw_rate),
            _contender("galore", 0.25, rate, **projected),
            _contender("optax_galore", 0.25, rate, **projected),
            _contender("adarankgrad", 0.25, rate, **projected),
            _contender("low_rank", 1.0, adamw_rate, **projected),
            _contender("lora", 1.0, adamw_rate, **projected),
            _contender("relora", 1.0, adamw_rate, update_proj_gap=2_000, **projected),
        ),
        seeds=(0,),
        search=1,
        data="c4",
        needs_tokenizer=True,
    )


PRETRAINING_SUITES: dict[str, Suite] = {
    "cpu-small": Suite(
        "every method on the tiny model, bytes, 600 steps of 1,024 tokens",
        CPU_SMALL,
        (*_METHODS, *_VARIANTS),
        # More than any search has taken until its best point was inside its neighbours.
        search=20,
    ),
    "cpu-long": _longer(
        "the tiny model, ten tokens a parameter: 2,100 steps of 4,096 tokens",
        _CPU_LONG,
    ),
    "cpu-wide": _longer(
        "the 5m model, one token a parameter: 1,250 steps of 4,096 tokens", _CPU_WIDE
    ),
    "c4-60m": Suite(
        "the 60m model, 105 M tokens, on an accelerator",
        _C4_60M,
        (
            _contender("adamw", 0.25, 4e-3),
            _contender("optax_galore", 0.5, 4e-3),
            _contender("galore", 0.5, 4e-3),
            _contender("adarankgrad", 0.5, 4e-3),
            _contender("projfactor", 0.5, 4e-3, rank=8, granularity=16),
            _contender("muon", 0.5, 4e-3),
            _contender("sumo", 1.0, 4e-3),
            _contender("low_rank_muon", 0.5, 4e-3),
        ),
        seeds=(0,),
        search=3,
        data="c4",
        needs_tokenizer=True,
    ),
    "papers-60m": _published("60m", 10_000, 128, 1e-3),
    "papers-130m": _published("130m", 20_000, 256, 1e-3),
    "papers-350m": _published("350m", 60_000, 256, 5e-4),
    "papers-1b": _published("1b", 100_000, 512, 5e-4),
}
