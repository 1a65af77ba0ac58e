"""The configuration of a run: what its flags and its file may say."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lowrank_optax
from experiments.arguments import (
    check_choice,
    check_ranges,
    field_names,
    flag,
    given_flags,
    nearest,
    parse_arguments,
    words_of,
)
from experiments.errors import UserError
from experiments.model.shape import MODELS
from experiments.optim.methods import BUDGETED, OPTIMIZERS, OWN_OPTIONS
from experiments.optim.options import with_defaults
from experiments.run.files import CONFIG_FILE
from experiments.run.flags import Config
from experiments.run.profile import profiled_steps
from experiments.run.unused import check_unused
from experiments.run.wandb_run import import_wandb

PROGRAM = "experiments.pretrain_llama"
Flags = TypeVar("Flags", bound=Config)


# What a configuration file says of the run that wrote it, and of no other.
_OF_ONE_RUN = frozenset({"config", "out", "resume", "allow_changes"})
_OF_ONE_METHOD = OWN_OPTIONS | {"block_scale"}


def parse(argv: Sequence[str]) -> Config:
    """Returns the configuration that the arguments spell, each value checked.

    Raises:
        UserError: If a flag or a value is not one of ours.
        SystemExit: With status 0, after ``--help``.
    """
    config = read(argv, Config, PROGRAM)
    check(config, given_flags(argv))
    return config


def read(argv: Sequence[str], options: type[Flags], program: str) -> Flags:
    """Returns what arguments and files spell, nothing checked but the files.

    Args:
        argv: Arguments, without the name.
        options: The configuration, or a class with further flags.
        program: Module of the command.

    Raises:
        UserError: If a flag, or a setting in a file, is not one of ours.
        SystemExit: With status 0, after ``--help``.
    """
    program = f"python -m {program}"
    config = parse_arguments(options, program, argv)
    files = []
    if config.resume and config.out and (config.out / CONFIG_FILE).is_file():
        files.append(config.out / CONFIG_FILE)
    if config.config is not None:
        files.append(config.config)
    words = [word for path in files for word in _words_of_file(path, config, argv)]
    config = parse_arguments(options, program, [*words, *argv])
    return dataclasses.replace(config, config=None)


def _words_of_file(path: Path, config: Config, argv: Sequence[str]) -> list[str]:
    """Returns the flags that spell a file's settings, but for those of its run."""
    saved = read_config(path)
    # Once without flags: what is wrong then is wrong in the file.
    try:
        of_file = from_json(saved)
        check(of_file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "optimizer" in given_flags(argv) and config.optimizer != of_file.optimizer:
        saved = {k: v for k, v in saved.items() if k not in _OF_ONE_METHOD}
    return words_of({k: v for k, v in saved.items() if k not in _OF_ONE_RUN})


def read_config(path: Path) -> dict[str, Any]:
    """Returns the fields that a configuration file sets, as JSON has them.

    Args:
        path: A file that :func:`to_json` has made, or a part of one.

    Raises:
        UserError: If it cannot be read or has a field that is not of ours.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the config.json of a run"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); give the config.json of a run"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(
            f"{path} holds no settings by name; give the config.json of a run"
        )
    # What a run that was resumed tells of its past.
    fields.pop("changes", None)
    names = field_names(Config)
    for name in fields:
        if name not in names:
            raise UserError(f"{path}: {name} is not a setting{nearest(name, names)}")
    return fields


def from_json(fields: Mapping[str, Any]) -> Config:
    """Returns the configuration that :func:`to_json` has made into fields.

    Raises:
        UserError: If a field is unknown or its value not of its type.
    """
    return parse_arguments(Config, PROGRAM, words_of(fields))


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
    check_choice("--optimizer", config.optimizer, OPTIMIZERS)
    check_ranges(config)
    if config.profile is not None:
        start, _ = profiled_steps(config.profile)
        if start > config.steps:
            raise UserError(
                f"--profile {config.profile} begins after --steps {config.steps}"
            )
    if config.wandb is not None:
        import_wandb()
    if config.block_state_bytes is not None:
        _check_budget(config)
    check_unused(config, given)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size "
            f"{config.batch_size}; choose a divisor"
        )
    if config.resume and config.out is None:
        raise UserError("--resume needs --out, the directory of the run to continue")


def _check_budget(config: Config) -> None:
    if config.optimizer not in BUDGETED:
        raise UserError(
            f"--block-state-bytes does not work with {config.optimizer}; choose "
            f"{' or '.join(BUDGETED)}, or give --rank"
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
    _check_order(config, "warmup_steps", "steps", strictly=True)
    _check_order(config, "min_rank", "rank")
    _check_order(config, "min_refresh_interval", "max_refresh_interval")
    return config


def to_json(config: Config) -> dict[str, Any]:
    """Returns the fields as values that JSON knows."""
    fields = dataclasses.asdict(config)
    del fields["config"]
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def _check_order(config: Config, low: str, high: str, strictly: bool = False) -> None:
    small, large = getattr(config, low), getattr(config, high)
    if small is None or large is None or small < large + (not strictly):
        return
    raise UserError(
        f"{flag(low)} must be {'below' if strictly else 'at most'} {flag(high)} "
        f"({large}), not {small}"
    )
