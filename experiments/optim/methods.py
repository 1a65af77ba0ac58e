"""The optimizers of the block matrices, by name.

To add a method, add an entry to :data:`OPTIMIZERS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import lowrank_optax
from experiments.optim import constructors


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer of the block matrices.

    Attributes:
        help: Description of the method, for the help of --optimizer.
        make: Function of the learning rate, Adam's b1, b2 and eps, weight_decay, seed,
            and the method's own options, by name. Leaves are stacks of matrices
            (L, n, m), and an encoder's pooler is a matrix (d, d).
        block_scale: Tuned default of --block-scale.
        own: Own options of the method, with their defaults.
            :func:`experiments.optim.options.with_defaults` fills in rank and min_rank
            where they are None. None of another one switches it off.
        takes_subspace_gradients: Whether projected gradients are enough on steps that
            renew no basis.
        codes: What of its state --moment-bits and --basis-bits can store.
        takes_vocabulary: Whether it can train embedding and head too, as
            --vocabulary-optimizer projected asks.
        rank_share: Default of --rank, as a share of the hidden size.
        adapters: Parameterisation of the block matrices
            (:mod:`experiments.model.adapters`) with trained factors. None: the method
            trains the matrices.
    """

    help: str
    make: Callable[..., optax.GradientTransformation]
    block_scale: float
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes_subspace_gradients: bool = False
    codes: frozenset[str] = frozenset({"moments"})
    takes_vocabulary: bool = True
    rank_share: float = 0.25
    adapters: Literal["lora", "relora", "low_rank"] | None = None


_BASES_TOO = frozenset({"moments", "bases"})
_ORTHOGONALIZED = {
    "rank": None,
    "update_proj_gap": 200,
    "momentum": 0.95,
    "basis": None,
    "power_iterations": 1,
    "rebase": "square",
}
_VARIOUS_GRAINED = {"rank": None, "granularity": 4, "update_proj_gap": 25}

OPTIMIZERS: dict[str, Method] = {
    "adamw": Method("AdamW on the whole matrices.", constructors.adamw, 0.125),
    "adarankgrad": Method(
        "Adam in a subspace whose rank and refreshes follow the gradient.",
        constructors.adarankgrad,
        0.5,
        rank_share=0.375,
        takes_subspace_gradients=True,
        own={
            "rank": None,
            "threshold": 0.0003,
            "min_rank": None,
            "final_min_rank": None,
            "min_rank_steps": None,
            "rank_smoothing": 0.5,
            "min_refresh_interval": 200,
            "max_refresh_interval": 300,
            "basis": None,
            "power_iterations": 2,
            "rebase": "square",
            "residual": None,
            "side": "short",
        },
        codes=_BASES_TOO,
    ),
    "galore": Method(
        "Adam in a subspace of fixed rank, renewed every --update-proj-gap steps.",
        constructors.galore,
        0.5,
        {"rank": None, "update_proj_gap": 200, "basis": None, "side": "short"},
        True,
        codes=_BASES_TOO,
    ),
    "vlorp": Method(
        "Adam on randomly projected pieces of rows (--granularity).",
        constructors.vlorp,
        0.5,
        _VARIOUS_GRAINED,
        True,
    ),
    "projfactor": Method(
        "As vlorp, with a factored second moment: less state.",
        constructors.projfactor,
        0.5,
        _VARIOUS_GRAINED,
        True,
    ),
    "sumo": Method(
        "Orthogonalized momentum in a subspace.",
        constructors.orthogonalized(lowrank_optax.sumo),
        1.0,
        _ORTHOGONALIZED,
        True,
        codes=_BASES_TOO,
    ),
    "low_rank_muon": Method(
        "Orthogonalized momentum from a subspace, with the gradient outside it.",
        constructors.orthogonalized(lowrank_optax.low_rank_muon),
        0.5,
        {**_ORTHOGONALIZED, "residual": 4.0, "neuron_decay": None},
        codes=_BASES_TOO,
    ),
    "ldadam": Method(
        "Adam in a subspace that moves at each step (without error feedback).",
        constructors.ldadam,
        0.5,
        {"rank": None},
        codes=_BASES_TOO,
    ),
    "fira": Method(
        "galore, and what lies outside its subspace, scaled as what lies inside.",
        constructors.fira,
        0.5,
        {"rank": None, "update_proj_gap": 200},
        codes=_BASES_TOO,
    ),
    "frugal": Method(
        "galore, and the signs of the gradient outside its subspace.",
        constructors.frugal,
        0.25,
        {"rank": None, "update_proj_gap": 200, "residual": 1.0},
        codes=_BASES_TOO,
    ),
    "apollo": Method(
        "The gradient, each channel scaled as Adam scales its random projection.",
        lowrank_optax.apollo,
        0.5,
        {"rank": None, "update_proj_gap": 200},
    ),
    "apollo_mini": Method(
        "apollo of rank 1, with one scale for a whole matrix.",
        constructors.apollo_mini,
        0.5,
        {"update_proj_gap": 200},
    ),
    "muon": Method(
        "Orthogonalized momentum of the whole matrices (optax.contrib.muon).",
        constructors.muon,
        0.5,
        {"momentum": 0.95, "neuron_decay": None},
    ),
    "scale": Method(
        "Gradients with all outputs of a matrix at one size, and no state (SCALE; its "
        "momentum of the head is left to --vocabulary-optimizer).",
        constructors.scale,
        0.5,
        codes=frozenset(),
    ),
    "stable_spam": Method(
        "Adam on gradients clipped and scaled by their past, its moments reset every "
        "--reset-every steps.",
        constructors.stable_spam,
        0.125,
        {"reset_every": 500},
    ),
    "foam": Method(
        "Adam whose moments are of the means of neighbouring inputs (--fold-level), "
        "with the gradient less these means.",
        constructors.foam,
        0.25,
        {"fold_level": 2},
        # Tokens that follow each other have nothing in common.
        takes_vocabulary=False,
    ),
    "adafactor": Method(
        "A factored second moment and no first one.",
        constructors.adafactor,
        0.125,
        codes=frozenset(),
    ),
    "lora": Method(
        "The matrices stay frozen, and AdamW trains low-rank adapters beside them.",
        constructors.of_factors,
        0.25,
        {"rank": None},
        adapters="lora",
        takes_vocabulary=False,
    ),
    "relora": Method(
        "lora, its adapters merged and begun anew every --update-proj-gap steps.",
        constructors.relora,
        0.25,
        {"rank": None, "update_proj_gap": 200},
        adapters="relora",
        takes_vocabulary=False,
    ),
    "low_rank": Method(
        "Each matrix is a product of two thin ones, which AdamW trains.",
        constructors.of_factors,
        0.25,
        {"rank": None},
        adapters="low_rank",
        takes_vocabulary=False,
    ),
    "optax_galore": Method(
        "optax.contrib.galore, Optax's own, to compare with.",
        constructors.optax_galore,
        0.5,
        {"rank": None, "update_proj_gap": 200},
        codes=frozenset(),
        takes_vocabulary=False,
    ),
}
# Methods whose rank may follow from --block-state-bytes: their states hold the bases,
# and so tell the rank.
BUDGETED = tuple(
    name for name, x in OPTIMIZERS.items() if "rank" in x.own and x.codes == _BASES_TOO
)
# The own options of all methods.
OWN_OPTIONS = frozenset(name for method in OPTIMIZERS.values() for name in method.own)


def gradients_of(options: Any) -> Literal["subspace", "full"]:
    """Returns what the steps of a run compute: "subspace" or "full" gradients.

    Args:
        options: The flags of the run.
    """
    method = OPTIMIZERS[options.optimizer]
    is_enough = method.takes_subspace_gradients and not options.residual
    return options.gradients if is_enough else "full"
