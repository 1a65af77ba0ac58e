"""One optimizer for the whole model: a method for the blocks, AdamW for the rest."""

from collections.abc import Callable, Hashable
from typing import Any

import optax

import lowrank_optax
from experiments.model.groups import parameter_groups
from experiments.optim.constructors import adafactor
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.options import OptimizerOptions


def build_optimizer(
    options: OptimizerOptions,
    schedule: optax.Schedule,
    seed: int = 0,
    accumulate: int = 1,
    *,
    head_schedule: optax.Schedule | None = None,
    groups_of: Callable[[Any], Any] = parameter_groups,
) -> optax.GradientTransformation:
    """Returns clipping, then the method for the block matrices and AdamW for the rest.

    A non-finite gradient changes neither parameters nor state. The state counts such
    gradients in ``notfinite_count`` and ``total_notfinite``. With micro-batches,
    clipping takes the norm of the mean gradient inside the subspaces.

    Args:
        options: The flags, filled in by
            :func:`experiments.optim.options.with_defaults`.
        schedule: Learning rate of the rest. The blocks' learning rate is
            ``block_scale`` times this rate.
        seed: Seed of the method's draws.
        accumulate: Micro-batches per update; above 1 the result is a
            :func:`lowrank_optax.accumulate`.
        head_schedule: Learning rate of an encoder's head for its labels; None: there is
            none.
        groups_of: Returns the groups of parameters, as
            :func:`experiments.model.groups.parameter_groups` does.
    """
    method = OPTIMIZERS[options.optimizer]
    scale = method.block_scale if options.block_scale is None else options.block_scale
    own = {name: getattr(options, name) for name in method.own}
    if options.block_state_bytes is not None:
        own["rank"] = lowrank_optax.budget(options.block_state_bytes)
    adam: dict[str, Any] = {"b1": options.b1, "b2": options.b2, "eps": options.eps}
    decay: dict[str, Any] = {"weight_decay": options.weight_decay}

    def of_method(rate):
        made = method.make(rate, seed=seed, **adam, **decay, **own)
        if options.moment_bits is None and options.basis_bits is None:
            return made
        return lowrank_optax.low_bit(made, options.moment_bits, options.basis_bits)

    adamw = optax.adamw(schedule, **adam, **decay)
    vocabulary: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: adamw,
        "low_bit": lambda: lowrank_optax.low_bit(adamw),
        "projected": lambda: of_method(schedule),
        "factored": lambda: adafactor(schedule, **decay),
    }
    groups: dict[Hashable, optax.GradientTransformation] = {
        "blocks": of_method(lambda count: scale * schedule(count)),
        "rest": vocabulary[options.vocabulary_optimizer](),
        "norms": optax.adamw(schedule, **adam, weight_decay=0.0),
        "frozen": optax.set_to_zero(),
    }
    if head_schedule is not None:
        groups["classifier"] = optax.adamw(head_schedule, **adam, **decay)
    grouped = optax.partition(groups, groups_of)
    if options.rounding == "stochastic":
        grouped = optax.chain(grouped, lowrank_optax.stochastic_rounding(seed))
    if options.clip_norm is not None:
        grouped = optax.chain(optax.clip_by_global_norm(options.clip_norm), grouped)
    tx = lowrank_optax.apply_if_finite(grouped)
    return lowrank_optax.accumulate(tx, accumulate) if accumulate > 1 else tx
