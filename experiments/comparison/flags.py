"""The flags of a contender's runs, and the settings in the record of a result."""

from typing import Any

from experiments.arguments import words_of
from experiments.comparison.suites import Contender, Suite
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS, OWN_OPTIONS
from experiments.run.config import complete, parse


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
    config = parse(words_of(fields_of(contender, suite)))
    config = complete(config, hidden_size=MODELS[config.model]["hidden_size"])
    own = OPTIMIZERS[config.optimizer].own
    return {**contender.flags, **{name: getattr(config, name) for name in sorted(own)}}
