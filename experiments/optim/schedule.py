"""The learning rate over a run: a warm-up, then the curve of ``--schedule``."""

import optax

from experiments.optim.options import OptimizerOptions


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Returns the learning rate of embedding, head and norms by update, from 0 on.

    A linear warm-up gives the first update a rate above zero. What follows it ends,
    unless it is constant, at the last update.

    Args:
        options: Filled in by :func:`experiments.optim.options.with_defaults`.
        steps: Length of the run, above ``options.warmup_steps``.
    """
    peak, warmup = options.learning_rate, options.warmup_steps or 0
    end = peak * options.final_learning_rate_fraction
    if options.schedule == "cosine":
        curve = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    else:
        left = steps - warmup
        lengths = {
            "constant": 0,
            "linear": left,
            "wsd": min(left, max(1, round(steps * (options.decay_fraction or 0)))),
        }
        decay = lengths[options.schedule]
        curve = optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, end if decay else peak, decay),
            ],
            [warmup, steps - decay],
        )
    return lambda count: curve(count + 1)
