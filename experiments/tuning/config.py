"""The configuration of a fine-tuning run: its checks and its defaults."""

import dataclasses
import math
import re
from typing import Any

from experiments.arguments import check_choice, field_names
from experiments.errors import UserError
from experiments.optim.tuning import with_tuning_defaults
from experiments.run.config import FIXED, check_orders, check_run
from experiments.run.flags import (
    CheckpointFlags,
    DeviceFlags,
    LoggingFlags,
    OutputFlags,
)
from experiments.run.settings import Settings
from experiments.run.unused import OF_ALL_RUNS, Rule, check_unused, unused_by
from experiments.tasks.metrics import import_metrics
from experiments.tasks.table import TASKS
from experiments.tuning.flags import AdapterFlags, TuningConfig, ValidationFlags

_EPOCHS = 3.0


def _is_answer(config: TuningConfig) -> bool:
    return TASKS[config.task].kind == "answer"


_RULES = (
    Rule(
        ("dropout", "head_learning_rate"),
        lambda c, m: _is_answer(c),
        "--task {c.task} trains a LLaMA, which has neither dropout nor a new head",
    ),
    Rule(
        ("prompt", "eval_examples"),
        lambda c, m: not _is_answer(c),
        "--task {c.task} trains an encoder, which answers nothing",
    ),
    Rule(
        ("answer_tokens",),
        lambda c, m: c.task != "gsm8k",
        "--task {c.task} writes no answers",
    ),
    Rule(
        ("rounding",),
        lambda c, m: c.param_dtype == "float32",
        "parameters are float32",
    ),
    Rule(
        ("save_adapter",),
        lambda c, m: m.adapters == "lora" and c.save_adapter is not None,
        "{c.optimizer} has adapters of --rank, which are written",
    ),
    Rule(
        ("save_adapter",),
        lambda c, m: m.adapters == "low_rank" and c.save_adapter is not None,
        "{c.optimizer} begins with other matrices than those of the model",
    ),
)


def unused(config: TuningConfig) -> dict[str, str]:
    """Returns the fields of a fine-tuning run that have no effect, and why."""
    shared = [rule for rule in OF_ALL_RUNS if "compact" not in rule.names]
    return unused_by([*_RULES, *shared], config)


def check(config: TuningConfig, given: frozenset[str] = frozenset()) -> None:
    """Checks the values, before any default is filled in.

    Args:
        config: To be checked.
        given: Fields whose flags are on the command line.

    Raises:
        UserError: If a value is out of its range or unknown, or a flag that is given
            has no effect.
    """
    check_choice("--task", config.task, TASKS)
    check_run(config)
    if config.frozen is not None:
        try:
            re.compile(config.frozen)
        except re.error as error:
            raise UserError(
                f"--frozen {config.frozen} is not a regular expression: {error}"
            ) from error
    if config.steps is not None and config.epochs is not None:
        raise UserError(
            f"--steps {config.steps} and --epochs {config.epochs:g} both say how long "
            "the run is; leave one of them out"
        )
    adapter = config.save_adapter
    if adapter is not None and adapter >= 1 and not adapter.is_integer():
        raise UserError(
            f"--save-adapter {adapter:g} is neither a rank nor a share; give a whole "
            "number, or one above 0 and below 1"
        )
    if config.train is None and config.task != "classification":
        raise UserError(
            f"--task {config.task} has no examples of its own; give --train, a file of "
            ".jsonl, .csv or .tsv, or hub:OWNER/NAME"
        )
    if config.train is None and config.validation is not None:
        raise UserError("--validation needs --train; give both, or neither")
    check_unused(config, unused(config), given)
    if not _is_answer(config):
        import_metrics()


def _implied(config: TuningConfig) -> dict[str, Any]:
    """Returns the defaults that depend on no data; of the length, the warm-up alone."""
    found = with_tuning_defaults(config, steps=config.steps or 1)
    if not _is_answer(config) and config.head_learning_rate is None:
        found["head_learning_rate"] = config.learning_rate
    return found


TUNING = Settings(
    options=TuningConfig,
    program="experiments.finetune",
    check=check,
    free=frozenset(
        {
            *field_names(OutputFlags),
            *field_names(AdapterFlags),
            *field_names(CheckpointFlags),
            *field_names(DeviceFlags),
            *field_names(LoggingFlags),
            *field_names(ValidationFlags),
            "epochs",
        }
    ),
    data=frozenset(
        {
            *("train", "validation", "validation_examples"),
            *("text_columns", "label_column", "prompt"),
        }
    ),
    fixed=FIXED | {"model", "adapter", "task", "max_length", "seeds", "frozen"},
    implied=_implied,
    either=frozenset({"steps", "epochs"}),
)


def complete(config: TuningConfig, steps_per_epoch: int) -> TuningConfig:
    """Returns the configuration with None replaced by the defaults.

    Args:
        config: Checked.
        steps_per_epoch: Steps that a pass over the training examples takes.

    Raises:
        UserError: If two values contradict each other.
    """
    steps = config.steps
    if steps is None:
        steps = max(1, math.ceil((config.epochs or _EPOCHS) * steps_per_epoch - 1e-6))
    config = dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        eval_every=config.eval_every or steps_per_epoch,
    )
    config = dataclasses.replace(config, **_implied(config))
    check_orders(config)
    return config
