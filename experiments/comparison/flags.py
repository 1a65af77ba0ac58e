"""The settings that the result of a run is recorded with."""

from typing import Any

from experiments.arguments import words_of
from experiments.comparison.suites import Contender, Suite
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS
from experiments.run.config import complete, parse


def resolved(contender: Contender, suite: Suite) -> dict[str, Any]:
    """Returns a contender's flags and what its method has where they are silent.

    With them a result is recorded: where a default has changed since, it is another's.
    """
    config = parse(words_of({**suite.flags, **contender.flags}))
    config = complete(config, hidden_size=MODELS[config.model]["hidden_size"])
    own = OPTIMIZERS[config.optimizer].own
    return {**contender.flags, **{name: getattr(config, name) for name in sorted(own)}}
