"""The commands that a comparison can run: pre-training and fine-tuning."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from experiments.comparison.examples import find_examples
from experiments.model.shape import MODELS
from experiments.run.config import PRETRAINING, Config, complete
from experiments.run.settings import Settings
from experiments.tuning.config import TUNING
from experiments.tuning.flags import TuningConfig


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A command that trains, as a comparison sees it.

    Attributes:
        settings: Of the command: its module, its flags.
        completed: Flags by field -> the configuration with the optimizer's defaults.
        data: (flags of the suite, ``--data``, ``--validation-data``, ``--tokenizer``)
            -> the flags that say what is trained on, None included; raises UserError
            if there is no such data.
        kept: Entries of summary.json that the record of a run has.
        has_learned: summary.json -> whether the run counts; it has diverged otherwise.
    """

    settings: Settings[Any]
    completed: Callable[[Mapping[str, Any]], Any]
    data: Callable[[Mapping[str, Any], str, str | None, str], dict[str, Any]]
    kept: tuple[str, ...]
    has_learned: Callable[[Mapping[str, Any]], bool]


# Both without the seconds that the command line of each contender would take.
def _pretraining(fields: Mapping[str, Any]) -> Config:
    config = Config(**fields)
    PRETRAINING.check(config, frozenset(fields))
    return complete(config, hidden_size=MODELS[config.model]["hidden_size"])


def _text(flags, data, validation_data, tokenizer):
    del flags
    return {"data": data, "validation_data": validation_data, "tokenizer": tokenizer}


def _has_fallen(summary: Mapping[str, Any]) -> bool:
    first = summary.get("initial_validation_loss")
    # None in a file is a number that is not finite.
    highest = math.inf if first is None else first
    return _is_finite(summary) and summary["validation_loss"] < highest


def _tuning(fields: Mapping[str, Any]) -> TuningConfig:
    config = TuningConfig(**fields)
    return dataclasses.replace(config, **TUNING.implied(config))


def _examples(flags, data, validation_data, tokenizer):
    del tokenizer
    train, validation = find_examples(flags["task"], data, validation_data)
    return {"train": train, "validation": validation}


def _is_finite(summary: Mapping[str, Any]) -> bool:
    # A metric may be worse than at first; the loss says whether the run diverged.
    loss = summary.get("validation_loss")
    return loss is not None and math.isfinite(loss)


_COSTS = (
    "tokens_per_second",
    "training_seconds",
    "optimizer_state_bytes",
    "adamw_state_bytes",
    "block_state_bytes",
    "block_adamw_state_bytes",
    "data",
    "device",
    "versions",
)

PRETRAINER = Trainer(
    PRETRAINING,
    _pretraining,
    _text,
    ("initial_validation_loss", "model", "steps", "tokens", *_COSTS),
    _has_fallen,
)
TUNER = Trainer(
    TUNING,
    _tuning,
    _examples,
    (
        *("task", "model", "steps", "epoch", "tokens"),
        *("metric", "initial_metric", "last_metric", "best_metric", "best_step"),
        *("last_metrics", "step_seconds", "compile_seconds", "step_peak_bytes"),
        *("mean_ranks", "effective_rank", "effective_rank_by_layer"),
        "rank_reduction",
        *_COSTS,
    ),
    _is_finite,
)
