"""What a run that is resumed may have other than before, and what is told of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.arguments import flag
from experiments.errors import UserError
from experiments.run.settings import Settings, to_json

# Name of a field -> its value before, and now.
Changes = dict[str, list[Any]]


def changes(saved: Mapping[str, Any], config: Any, settings: Settings) -> Changes:
    """Returns what a configuration computes otherwise than a saved one.

    Args:
        saved: From :func:`experiments.run.settings.to_json`.
        config: Completed.
        settings: Of the command.
    """
    ignored = settings.free | settings.data
    found = _differences(saved, config, settings)
    return {name: pair for name, pair in found.items() if name not in ignored}


def data_changes(saved: Mapping[str, Any], config: Any, settings: Settings) -> Changes:
    """Returns where a configuration has its data, if not where a saved one has it.

    Args:
        saved: From :func:`experiments.run.settings.to_json`.
        config: Completed.
        settings: Of the command.
    """
    found = _differences(saved, config, settings)
    return {name: pair for name, pair in found.items() if name in settings.data}


def _differences(saved: Mapping[str, Any], config: Any, settings: Settings) -> Changes:
    now = to_json(config)
    # A setting that was added since then had its default.
    before = {**to_json(settings.options()), **saved}
    return {
        name: [before.get(name), now.get(name)]
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def check_changes(
    changed: Changes, config: Any, settings: Settings, directory: Path, step: int
) -> None:
    """Checks that a run may go on with these changes.

    More ``--steps`` are always allowed, and ``--allow-changes`` allows what fits the
    checkpoint.

    Args:
        changed: From :func:`changes`.
        config: Completed.
        settings: Of the command.
        directory: Of the run.
        step: Of its checkpoint.

    Raises:
        UserError: If one is not allowed; it names them all.
    """
    fixed = {name: pair for name, pair in changed.items() if name in settings.fixed}
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
