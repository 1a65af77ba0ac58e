"""The settings in the record of a run's result."""

from typing import Any

from experiments.arguments import words_of
from experiments.comparison.suites import Contender, Suite
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS
from experiments.run.config import complete, parse


def resolved(contender: Contender, suite: Suite) -> dict[str, Any]:
    """Returns a contender's flags, with the method's defaults for all other options.

    The record of a result has these settings. A result from before a change of a
    default therefore counts as the result of other settings.
    """
    config = parse(words_of({**suite.flags, **contender.flags}))
    config = complete(config, hidden_size=MODELS[config.model]["hidden_size"])
    own = OPTIMIZERS[config.optimizer].own
    return {**contender.flags, **{name: getattr(config, name) for name in sorted(own)}}
