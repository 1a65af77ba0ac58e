"""The suites of ``experiments.compare``: which methods, on what, how searched."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contender:
    """One method of a comparison.

    Attributes:
        name: In tables and in directory names.
        flags: Of ``pretrain_llama``, by field.
        learning_rate: Of embedding, head and norms: where the search starts.
        block_scale: Learning rate of the block matrices, as a multiple of that: where
            the search starts.
    """

    name: str
    flags: Mapping[str, Any]
    block_scale: float
    learning_rate: float = 8e-3


@dataclasses.dataclass(frozen=True)
class Suite:
    """A comparison.

    Attributes:
        description: One sentence.
        flags: Of every run, by field.
        contenders: The methods.
        seeds: Of the weights and of the order of the data. The first one's runs choose
            the rates; the best rates are run with all.
        search: Runs that a method may spend on its two rates, at most; 1: none.
    """

    description: str
    flags: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    search: int = 6


def _contender(name: str, block_scale: float, rate: float = 8e-3, **flags: Any):
    return Contender(name, {"optimizer": name, **flags}, block_scale, rate)


_8_BITS = {"moment_bits": 8, "vocabulary": "low_bit"}

_SMALL_STATE = {"moment_bits": 8, "basis_bits": 8, "vocabulary": "low_bit"}

# The default rank is a quarter of the hidden size.
_METHODS = (
    _contender("adamw", 0.125),
    _contender("muon", 0.5),
    _contender("optax_galore", 0.5),
    _contender("adarankgrad", 0.5),
    _contender("sumo", 1.0),
    _contender("galore", 0.5),
    _contender("fira", 0.5),
    _contender("apollo", 0.5),
    _contender("adafactor", 0.125),
    _contender("vlorp", 0.5),
    _contender("projfactor", 0.5),
    _contender("ldadam", 0.5),
    _contender("apollo_mini", 0.5),
    _contender("lora", 0.25),
    _contender("relora", 0.25),
    _contender("low_rank", 0.25),
    _contender("adamw 8 bits", 0.125, optimizer="adamw", **_8_BITS),
    _contender("galore 8 bits", 0.5, optimizer="galore", **_8_BITS),
    _contender("adarankgrad 8 bits", 0.5, optimizer="adarankgrad", **_8_BITS),
    _contender("sumo 8 bits", 1.0, optimizer="sumo", **_SMALL_STATE),
)
# Half of the hidden size, by model: methods that keep less a column.
_WIDE = (
    _contender("sumo r=64", 1.0, optimizer="sumo", rank=64),
    _contender("sumo r=64 8 bits", 1.0, optimizer="sumo", rank=64, **_SMALL_STATE),
)

_CPU_SMALL = {
    "model": "tiny",
    "steps": 600,
    "eval_every": 100,
    "eval_tokens": 131_072,
    "sample_tokens": 0,
}


def _ablation(description: str, **variants: Mapping[str, Any]) -> Suite:
    """Returns variants of AdaRankGrad at the rates that were best for it."""
    return Suite(
        description,
        _CPU_SMALL,
        tuple(
            _contender(name.replace("_", " "), 0.5, optimizer="adarankgrad", **flags)
            for name, flags in variants.items()
        ),
        seeds=(0, 1),
        search=1,
    )


SUITES: dict[str, Suite] = {
    "cpu-small": Suite(
        "every method on the tiny model, bytes, 600 steps of 1,024 tokens",
        _CPU_SMALL,
        (*_METHODS, *_WIDE),
    ),
}
