"""The flags of a contender's runs, and the settings in the record of a result."""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.comparison.suite import Contender, Suite
from experiments.optim.methods import OPTIMIZERS, OWN_OPTIONS


def fields_of(contender: Contender, suite: Suite) -> dict[str, Any]:
    """Returns the flags of a contender's runs, by field.

    Of the suite's flags, such as a rank, a method has those that have an effect in it.
    """
    own = OPTIMIZERS[contender.flags["optimizer"]].own
    others = OWN_OPTIONS - own.keys()
    fields = {k: v for k, v in suite.flags.items() if k not in others}
    return {**fields, **contender.flags}


def resolved(contender: Contender, suite: Suite) -> dict[str, Any]:
    """Returns a contender's flags, with the method's defaults for all other options.

    The record of a result has these settings. A result from before a change of a
    default therefore counts as the result of other settings.
    """
    config = suite.trainer.completed(fields_of(contender, suite))
    own = OPTIMIZERS[config.optimizer].own
    found = {**contender.flags, **{name: getattr(config, name) for name in sorted(own)}}
    return in_use(found)


def settings_of(suite: Suite) -> dict[str, dict[str, Any]]:
    """Returns name of a contender -> its settings, see :func:`resolved`."""
    return {c.name: resolved(c, suite) for c in suite.contenders}


def in_use(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without those that are None: nobody uses these.

    A record may be older than an option. Its run was as runs without the option are.
    """
    return {name: value for name, value in settings.items() if value is not None}


def present(
    records: Iterable[dict[str, Any]], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the records of methods with their present settings.

    Args:
        records: Lines of results.jsonl.
        settings: Of the suite, from :func:`settings_of`.
    """
    return [x for x in records if settings.get(x["method"]) == in_use(x["flags"])]
