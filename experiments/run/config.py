"""The configuration of a pre-training run: what its flags and its file may say."""

import dataclasses
import glob
import os
import re
from typing import Any

import lowrank_optax
from experiments.arguments import check_choice, check_ranges, field_names, flag
from experiments.distribution.processes import AUTOMATIC
from experiments.errors import UserError
from experiments.model.shape import MODELS
from experiments.optim.methods import BUDGETED, OPTIMIZERS
from experiments.optim.options import OptimizerOptions, with_defaults
from experiments.run.flags import (
    CheckpointFlags,
    Config,
    DataFlags,
    DeviceFlags,
    LoggingFlags,
    OutputFlags,
    SampleFlags,
    ValidationFlags,
)
from experiments.run.profile import profiled_steps
from experiments.run.settings import Settings
from experiments.run.unused import check_unused, unused
from experiments.run.wandb_run import import_wandb

# Fields of all training commands that the arrays of a checkpoint depend on, or its
# place in the data.
FIXED = frozenset(
    {
        *("param_dtype", "scan_layers"),
        *("optimizer", "vocabulary_optimizer", "rank"),
        *("block_state_bytes", "granularity", "side", "basis"),
        *("moment_bits", "basis_bits"),
        *("accumulate", "batch_size", "seed"),
    }
)


def check(config: Config, given: frozenset[str] = frozenset()) -> None:
    """Checks the values, before any default is filled in.

    Args:
        config: To be checked.
        given: Fields whose flags are on the command line.

    Raises:
        UserError: If a value is out of its range or unknown, or a flag that is given
            has no effect.
    """
    check_choice("--model", config.model, MODELS)
    check_run(config)
    check_unused(config, unused(config), given)


def _implied(config: Config) -> dict[str, Any]:
    weights = config.initial_weights is not None
    size = MODELS[config.model]["hidden_size"]
    found = with_defaults(config, steps=config.steps, hidden_size=size)
    # The file of the weights has their model's size, a share of which is the rank.
    return {k: v for k, v in found.items() if not (weights and k == "rank")}


PRETRAINING = Settings(
    options=Config,
    program="experiments.pretrain_llama",
    check=check,
    free=frozenset(
        {
            *field_names(OutputFlags),
            *field_names(SampleFlags),
            *field_names(CheckpointFlags),
            *field_names(DeviceFlags),
            *field_names(LoggingFlags),
            *field_names(ValidationFlags),
        }
    ),
    data=frozenset(field_names(DataFlags)) - {"batch_size", "sequence_length"},
    fixed=FIXED | {"model", "kv_heads", "tied_embeddings", "sequence_length"},
    implied=_implied,
)

parse = PRETRAINING.parse


def check_run(config: Any) -> None:
    """Checks what all training commands have, before any default is filled in.

    Raises:
        UserError: If a value is out of its range or unknown.
    """
    check_choice("--optimizer", config.optimizer, OPTIMIZERS)
    check_ranges(config)
    if config.profile is not None:
        start, _ = profiled_steps(config.profile)
        if config.steps is not None and start > config.steps:
            raise UserError(
                f"--profile {config.profile} begins after --steps {config.steps}"
            )
    if config.wandb is not None:
        import_wandb()
    if config.block_state_bytes is not None:
        _check_budget(config)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size "
            f"{config.batch_size}; choose a divisor"
        )
    check_processes(config)
    if config.resume and config.out is None:
        raise UserError("--resume needs --out, the directory of the run to continue")
    # Orbax reads a checkpoint's path as a pattern, and would not find it again.
    if config.out is not None and glob.has_magic(os.path.abspath(config.out)):
        raise UserError(
            f"--out {config.out}: a checkpoint below a directory with one of * ? [ in "
            "its name cannot be restored; give another one"
        )


def check_processes(config: Any) -> None:
    """Checks the flags that join a process to others.

    Raises:
        UserError: If one is missing or cannot be.
    """
    given = {"num_processes": config.num_processes, "process_id": config.process_id}
    if config.coordinator is None:
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{flag(name)} {value} needs --coordinator HOST:PORT, the address "
                    "of process 0"
                )
        return
    if config.coordinator == AUTOMATIC:
        return
    if not re.fullmatch(r"\S+:\d{1,5}", config.coordinator):
        raise UserError(
            f"--coordinator {config.coordinator} is not HOST:PORT, nor auto; give the "
            "address of process 0, like node0:1234"
        )
    for name, value in given.items():
        if value is None:
            raise UserError(
                f"--coordinator {config.coordinator} needs {flag(name)}; or give "
                "--coordinator auto, what JAX detects of the cluster"
            )
    if config.process_id >= config.num_processes:
        raise UserError(
            f"--process-id {config.process_id}: the processes have the numbers 0 to "
            f"{config.num_processes - 1}, one less than --num-processes"
        )


def _check_budget(config: OptimizerOptions) -> None:
    if config.optimizer not in BUDGETED:
        raise UserError(
            f"--block-state-bytes does not work with {config.optimizer}; choose "
            f"{', '.join(BUDGETED)}, or give --rank"
        )
    try:
        lowrank_optax.budget(config.block_state_bytes or "")
    except ValueError as error:
        raise UserError(f"--block-state-bytes: {error}") from error


def complete(config: Config, hidden_size: int) -> Config:
    """Returns the configuration with None replaced by the optimizer's defaults.

    Args:
        config: Checked.
        hidden_size: Of the model; the default rank is a share of it.

    Raises:
        UserError: If two values contradict each other.
    """
    defaults = with_defaults(config, steps=config.steps, hidden_size=hidden_size)
    config = dataclasses.replace(config, **defaults)
    check_orders(config)
    return config


def check_orders(config: Any) -> None:
    """Raises UserError if two values of a completed configuration contradict."""
    _check_order(config, "warmup_steps", "steps", strictly=True)
    _check_order(config, "min_rank", "rank")
    _check_order(config, "final_min_rank", "min_rank")
    _check_order(config, "min_refresh_interval", "max_refresh_interval")


def _check_order(config: Any, low: str, high: str, strictly: bool = False) -> None:
    small, large = getattr(config, low), getattr(config, high)
    if small is None or large is None or small < large + (not strictly):
        return
    raise UserError(
        f"{flag(low)} must be {'below' if strictly else 'at most'} {flag(high)} "
        f"({large}), not {small}"
    )
