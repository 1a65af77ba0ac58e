"""The learning rate over a run: warm-up, then a cosine."""

import optax

from experiments.optim.options import OptimizerOptions


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Returns the learning rate of embedding, head and norms by update, from 0 on.

    A linear warm-up that gives the first update a rate above zero, then a cosine that
    reaches its end at the last update.
    """
    peak = options.learning_rate
    curve = optax.warmup_cosine_decay_schedule(
        0.0,
        peak,
        options.warmup_steps or 0,
        steps,
        peak * options.final_learning_rate_fraction,
    )
    return lambda count: curve(count + 1)
