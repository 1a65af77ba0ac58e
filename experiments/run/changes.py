"""What a run that is resumed may have other than before, and what is told of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.arguments import field_names, flag
from experiments.errors import UserError
from experiments.run.config import Config, to_json
from experiments.run.flags import (
    CheckpointFlags,
    DataFlags,
    LoggingFlags,
    OutputFlags,
)

# Fields that do not change what is computed.
FREE_FIELDS = frozenset(
    {
        *field_names(OutputFlags),
        *field_names(CheckpointFlags),
        *field_names(LoggingFlags),
    }
)
# Fields that say where the text is: the digest of its tokens says whether it is equal.
TEXT_FIELDS = frozenset(field_names(DataFlags)) - {"batch_size", "sequence_length"}
# Fields that the arrays of a checkpoint depend on, or its place in the text.
FIXED_FIELDS = frozenset(
    {
        *("model", "kv_heads", "tied_embeddings", "param_dtype"),
        *("optimizer", "vocabulary_optimizer", "rank", "block_state_bytes"),
        *("granularity", "side", "moment_bits", "basis_bits", "accumulate"),
        *("batch_size", "sequence_length", "seed"),
    }
)

# Name of a field -> its value before, and now.
Changes = dict[str, list[Any]]


def changes(saved: Mapping[str, Any], config: Config) -> Changes:
    """Returns what a configuration computes otherwise than a saved one.

    Args:
        saved: From :func:`experiments.run.config.to_json`.
        config: Completed.
    """
    now = to_json(config)
    # A setting that was added since then had its default.
    before = {**to_json(Config()), **saved}
    return {
        name: [before.get(name), now.get(name)]
        for name in sorted((before.keys() | now.keys()) - FREE_FIELDS - TEXT_FIELDS)
        if before.get(name) != now.get(name)
    }


def check_changes(changed: Changes, config: Config, directory: Path, step: int) -> None:
    """Checks that a run may go on with these changes.

    More ``--steps`` are always allowed, and ``--allow-changes`` allows what fits the
    checkpoint.

    Args:
        changed: From :func:`changes`.
        config: Completed.
        directory: Of the run.
        step: Of its checkpoint.

    Raises:
        UserError: If one is not allowed; it names them all.
    """
    fixed = {name: pair for name, pair in changed.items() if name in FIXED_FIELDS}
    if fixed:
        raise UserError(
            f"the run in {directory} has another configuration: {told(fixed)}; its "
            "checkpoint fits no other: leave these flags out, or give a new --out "
            "without --resume"
        )
    refused = {
        name: (before, now)
        for name, (before, now) in changed.items()
        if not (name == "steps" and now > before)
    }
    if refused and not config.allow_changes:
        raise UserError(
            f"the run in {directory} has another configuration: {told(refused)}; leave "
            "these flags out, or add --allow-changes to continue with them, or give a "
            "new --out without --resume"
        )
    if config.steps < step:
        raise UserError(
            f"--steps {config.steps}: the run in {directory} has done {step} already"
        )


def told(changed: Mapping[str, Any]) -> str:
    """Returns "--flag was X, is Y" for each change."""
    return ", ".join(
        f"{flag(name)} was {before}, is {now}"
        for name, (before, now) in changed.items()
    )
