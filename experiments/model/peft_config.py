"""PEFT's ``adapter_config.json`` of LoRA adapters."""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.model.config_file import read_json

# What we compute, as adapter_config.json says it; any other value is refused.
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Ranks and scales of adapters.

    Attributes:
        rank: r of a module that no pattern matches, >= 1.
        alpha: Its alpha, > 0; the scale is alpha / r.
        rank_pattern: Regular expression for the end of a module's name -> r.
        alpha_pattern: The same for alpha.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The scale of a module that no pattern matches."""
        return self.alpha / self.rank

    def rank_of(self, module: str) -> int:
        """Returns r of a module."""
        return _matched(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns alpha / r of a module."""
        alpha = _matched(self.alpha_pattern, module, self.alpha)
        return alpha / self.rank_of(module)


def write_peft_config(
    path: Path,
    ranks: Mapping[str, int],
    scale: float,
    modules: Iterable[str],
    **more: Any,
) -> None:
    """Writes the configuration of adapters that all have one scale.

    Args:
        path: The file.
        ranks: Module -> r, for each module with an adapter.
        scale: alpha / r of all modules.
        modules: All modules of the model.
        **more: Further entries.
    """
    ((rank, _),) = collections.Counter(ranks.values()).most_common(1)
    others = {module: r for module, r in ranks.items() if r != rank}
    raw = {
        **_FIXED,
        **more,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(scale, r) for module, r in others.items()},
        "target_modules": _targets(ranks.keys(), modules),
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def read_peft_config(path: Path) -> PeftConfig:
    """Reads a configuration.

    Raises:
        UserError: If the file is missing or is not JSON, lacks a number or has one
            that is out of its range, or asks for what we do not compute.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; give a directory that peft wrote")
    raw = read_json(path)
    for name, value in _FIXED.items():
        if raw.get(name) not in (None, value):
            raise UserError(
                f"{path}: {name} {raw[name]!r} is not supported; give plain LoRA "
                "adapters (no biases, no DoRA, no rank stabilisation)"
            )

    def number(name, value, kinds):
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            what = "an integer" if kinds is int else "a number"
            raise UserError(f"{path}: {name} is {value!r}; give {what} above 0")
        return value

    def pattern(name, kinds):
        found = raw.get(name) or {}
        for key, value in found.items():
            number(f"{name} of {key}", value, kinds)
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(
                    f"{path}: {name} has {key!r}, which is no regular expression "
                    f"({error}); name a module"
                ) from error
        return found

    return PeftConfig(
        number("r", raw.get("r"), int),
        number("lora_alpha", raw.get("lora_alpha"), (int, float)),
        pattern("rank_pattern", int),
        pattern("alpha_pattern", (int, float)),
    )


def _alpha(scale: float, rank: int) -> int | float:
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Returns names for the adapted modules: endings that no other module has."""
    adapted, modules = set(adapted), set(modules)
    # What stands behind the number of the layer.
    endings = {re.split(r"\.\d+\.", module)[-1] for module in adapted}
    own = {
        ending
        for ending in endings
        if {module for module in modules if module.endswith(f".{ending}")} <= adapted
    }
    rest = {m for m in adapted if not any(m.endswith(f".{ending}") for ending in own)}
    return sorted(own | rest)


def _matched(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    matches = (v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module))
    return next(matches, default)
