"""Flags that another flag leaves without effect: they are refused where given."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.arguments import flag
from experiments.errors import UserError
from experiments.optim.methods import OPTIMIZERS, OWN_OPTIONS, Method, gradients_of
from experiments.run.flags import Config


class Rule(NamedTuple):
    """Flags, when they have no effect, and why.

    Attributes:
        names: Fields of the configuration.
        applies: Called with the configuration and its method.
        why: The reason; ``{c.field}`` is a value of the configuration.
    """

    names: tuple[str, ...]
    applies: Callable[[Any, Method], bool]
    why: str


_RULES = (
    Rule(
        ("model", "kv_heads", "tied_embeddings"),
        lambda c, m: c.initial_weights is not None,
        "--initial-weights {c.initial_weights} say the shape",
    ),
    Rule(
        ("rounding",),
        lambda c, m: (
            c.param_dtype == "float32" or not (c.param_dtype or c.initial_weights)
        ),
        "parameters are float32 without --param-dtype bfloat16",
    ),
    Rule(
        ("sample_temperature",),
        lambda c, m: not c.sample_tokens,
        "there is no sample with --sample-tokens 0",
    ),
)
# Of what all training commands have.
OF_ALL_RUNS = (
    Rule(
        ("rank", "min_rank", "final_min_rank", "min_rank_steps"),
        lambda c, m: c.block_state_bytes is not None,
        "--block-state-bytes {c.block_state_bytes} decides about ranks",
    ),
    Rule(
        ("scan_layers",),
        lambda c, m: m.adapters is not None,
        "{c.optimizer} has adapters of one rank",
    ),
    Rule(
        ("min_rank_steps",),
        lambda c, m: c.final_min_rank is None,
        "the least rank stays without --final-min-rank",
    ),
    Rule(
        ("gradients",),
        lambda c, m: c.gradients == "subspace" and not m.takes_subspace_gradients,
        "{c.optimizer} has full gradients",
    ),
    Rule(
        ("gradients",),
        lambda c, m: c.gradients == "subspace" and bool(c.residual),
        "--residual {c.residual:g} needs full gradients",
    ),
    Rule(
        ("refresh",),
        lambda c, m: gradients_of(c) == "full",
        "gradients are full with --optimizer {c.optimizer} --gradients {c.gradients}",
    ),
    Rule(
        ("refresh",),
        lambda c, m: gradients_of(c) == "subspace" and "bases" not in m.codes,
        "{c.optimizer} draws its bases, and needs no full gradients for them",
    ),
    Rule(
        ("decay_fraction",),
        lambda c, m: c.schedule != "wsd",
        "it is for --schedule wsd, not {c.schedule}",
    ),
    Rule(
        ("final_learning_rate_fraction",),
        lambda c, m: c.schedule == "constant",
        "--schedule constant ends at the peak",
    ),
    Rule(
        ("moment_bits",),
        lambda c, m: c.moment_bits is not None and "moments" not in m.codes,
        "{c.optimizer} has no moments that can be stored in bits",
    ),
    Rule(
        ("moment_bits",),
        lambda c, m: c.optimizer == "muon" and c.momentum == 0,
        "muon --momentum 0 has no moments",
    ),
    Rule(
        ("basis_bits",),
        lambda c, m: c.basis_bits is not None and "bases" not in m.codes,
        "{c.optimizer} stores no bases",
    ),
    Rule(
        ("basis_bits",),
        lambda c, m: c.basis == "dct",
        "--basis dct stores numbers of columns, and no columns",
    ),
    Rule(
        ("power_iterations",),
        lambda c, m: c.basis in ("svd", "dct"),
        "--basis {c.basis} needs no power iterations",
    ),
    Rule(
        ("vocabulary_optimizer",),
        lambda c, m: c.vocabulary_optimizer == "projected" and not m.takes_vocabulary,
        "{c.optimizer} trains block matrices only",
    ),
    Rule(
        ("compact",),
        lambda c, m: c.compact and not c.block_state_bytes and "threshold" not in m.own,
        "{c.optimizer} uses all columns of its rank",
    ),
    Rule(
        ("compact_every",),
        lambda c, m: not c.compact,
        "there is no --compact",
    ),
    Rule(
        ("allow_changes",),
        lambda c, m: not c.resume,
        "there is no --resume",
    ),
)


def unused(config: Config) -> dict[str, str]:
    """Returns the fields of a pre-training run that have no effect, and why."""
    return unused_by(_RULES + OF_ALL_RUNS, config)


def unused_by(rules: Sequence[Rule], config: Any) -> dict[str, str]:
    """Returns the fields that have no effect by rules, and why."""
    method = OPTIMIZERS[config.optimizer]
    others = sorted(OWN_OPTIONS - method.own.keys())
    reasons = dict.fromkeys(others, f"{config.optimizer} has no such option")
    for names, applies, why in rules:
        if applies(config, method):
            reasons |= dict.fromkeys(names, why.format(c=config))
    return reasons


def check_unused(
    config: Any, reasons: Mapping[str, str], given: frozenset[str]
) -> None:
    """Raises UserError if a flag is given that has no effect.

    Args:
        config: Each value of which is allowed.
        reasons: Fields without effect, and why.
        given: Fields whose flags are on the command line. Those that differ from their
            defaults count as given in any case.
    """
    fields = dataclasses.fields(config)
    given |= {x.name for x in fields if getattr(config, x.name) != x.default}
    for name, reason in reasons.items():
        if name in given:
            raise UserError(f"{flag(name)} has no effect: {reason}; leave it out")
