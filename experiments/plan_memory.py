"""What a LLaMA takes with each optimizer: ``python -m experiments.plan_memory``.

From shapes alone: it answers for 7b on a laptop, in seconds.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import optax
import tyro
from rich.console import Console
from rich.table import Table

import lowrank_optax
from experiments.arguments import check_choice, flag, parse_arguments
from experiments.errors import UserError
from experiments.model.llama import init_params
from experiments.model.shape import MODELS, preset
from experiments.optim.build import build_optimizer
from experiments.optim.options import OptimizerOptions, with_defaults

# Ranks of the published runs.
_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Lists the bytes of parameters, gradients and optimizer state by optimizer.

    Activations come on top: what is left of the memory is for them.
    """

    #: Size of the LLaMA.
    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS) + "}")] = "7b"
    #: Tokens of the vocabulary.
    vocabulary_size: int = 32_000
    #: Type of parameters and gradients.
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    #: Rank of the projections, in columns. None: that of the published runs, or a
    #: quarter of the hidden size.
    rank: int | None = None
    #: Memory of the device, like 24GB.
    memory: str = "24GB"
    #: Print the plan of one optimizer leaf by leaf: a name from the first column.
    leaves_of: str | None = None
    #: Write the plans to this JSON file too.
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user's."""
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        plans = plans_by_name(options)
        if options.leaves_of is None:
            _print_table(plans, options)
        else:
            print(_chosen(plans, options.leaves_of))
        if options.json is not None:
            found = {name: plan.to_dict() for name, plan in plans.items()}
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def plans_by_name(options: Options) -> dict[str, Any]:
    """Returns the plan of each row of the table."""
    model = preset(
        options.model, options.vocabulary_size, param_dtype=options.param_dtype
    )
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    rank = options.rank or _RANKS.get(options.model, model.hidden_size // 4)
    return {
        name: lowrank_optax.memory_plan(
            optimizer(model.hidden_size, **{"rank": rank, **chosen}), params
        )
        for name, chosen in rows(rank).items()
    }


def rows(rank: int) -> dict[str, dict[str, Any]]:
    """Returns the options of each row of the table."""
    fine = {"rank": max(1, rank // 16), "granularity": 16}
    low_bit = {"moment_bits": 8, "vocabulary_optimizer": "low_bit"}
    return {
        "adamw": {"optimizer": "adamw"},
        "adamw, 8 bits": {"optimizer": "adamw", **low_bit},
        "galore": {"optimizer": "galore"},
        "galore, 8 bits": {"optimizer": "galore", **low_bit},
        "galore, 8 bits, basis 4": {"optimizer": "galore", "basis_bits": 4, **low_bit},
        "adarankgrad": {"optimizer": "adarankgrad"},
        "adarankgrad, 8 bits": {"optimizer": "adarankgrad", **low_bit},
        "sumo, 8 bits, basis 8": {"optimizer": "sumo", "basis_bits": 8, **low_bit},
        "low_rank_muon, 8 bits, basis 8": {
            "optimizer": "low_rank_muon",
            "basis_bits": 8,
            **low_bit,
        },
        "vlorp": {"optimizer": "vlorp", **fine},
        "projfactor": {"optimizer": "projfactor", **fine},
        "projfactor, 8 bits": {"optimizer": "projfactor", **fine, **low_bit},
        "galore everywhere, 8 bits, basis 4": {
            "optimizer": "galore",
            "moment_bits": 8,
            "basis_bits": 4,
            "vocabulary_optimizer": "projected",
        },
        "galore, 8 bits, basis 4, vocabulary factored": {
            "optimizer": "galore",
            "moment_bits": 8,
            "basis_bits": 4,
            "vocabulary_optimizer": "factored",
        },
    }


def optimizer(hidden_size: int, **chosen: Any) -> optax.GradientTransformation:
    """Returns an optimizer of the experiments."""
    options = OptimizerOptions(**chosen)
    defaults = with_defaults(options, steps=100, hidden_size=hidden_size)
    options = dataclasses.replace(options, **defaults)
    return build_optimizer(options, optax.constant_schedule(1e-3))


def _parse(argv: Sequence[str]) -> Options:
    options = parse_arguments(Options, "python -m experiments.plan_memory", argv)
    check_choice("--model", options.model, MODELS)
    try:
        lowrank_optax.budget(options.memory)
    except ValueError as error:
        raise UserError(f"--memory: {error}") from error
    for name in ("vocabulary_size", "rank"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1")
    return options


def _chosen(plans, name: str) -> Any:
    if name not in plans:
        raise UserError(f"--leaves-of {name!r} is none of: {'; '.join(plans)}")
    return plans[name]


def _print_table(plans, options: Options) -> None:
    memory = lowrank_optax.budget(options.memory).limit
    first = next(iter(plans.values()))
    table = Table(title=f"LLaMA {options.model}, {options.param_dtype}, in GB (10^9)")
    table.add_column("optimizer")
    columns = ("parameters", "gradients", "state", "of AdamW's", "left", "left *")
    for name in columns:
        table.add_column(name, justify="right")
    for name, plan in plans.items():
        lasting = plan.parameter_bytes + plan.optimizer_bytes
        table.add_row(
            name,
            *(
                f"{size / 1e9:,.2f}"
                for size in (
                    plan.parameter_bytes,
                    plan.gradient_bytes,
                    plan.optimizer_bytes,
                )
            ),
            f"{plan.optimizer_bytes / first.optimizer_bytes:.3f}",
            _left(memory - lasting - plan.gradient_bytes),
            _left(memory - lasting),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"left: of {options.memory}, for activations and the compiler's temporaries. "
        "left *: for gradients too, in a step that never holds them all at once.",
        highlight=False,
    )


def _left(size: int) -> str:
    return f"{size / 1e9:,.2f}" if size >= 0 else "does not fit"


if __name__ == "__main__":
    sys.exit(main())
