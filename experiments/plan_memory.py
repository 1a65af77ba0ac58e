"""What a run takes with each optimizer: ``python -m experiments.plan_memory``.

From shapes alone: it answers for 7b on a laptop, in seconds.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    from experiments.run.interrupts import leave_at_interrupt

    leave_at_interrupt()

from rich.console import Console
from rich.table import Table

import lowrank_optax
from experiments.arguments import check_choice, check_ranges, given_flags, run_command
from experiments.data.tokenizers import load_tokenizer
from experiments.errors import UserError
from experiments.optim.methods import gradients_of
from experiments.ranges import AtLeastOne
from experiments.run.config import PRETRAINING, check
from experiments.run.flags import Config
from experiments.run.plans import adamw_of, every_optimizer, on_a_device, plan_of

_BESIDE = (
    "Beside the plan a process takes: activations, which grow with --batch-size over "
    "--accumulate and --sequence-length, and shrink with --remat; the compiler's "
    "temporaries; on a GPU the driver's context and the compiled programs; on a CPU "
    "Python, JAX and the tokenized text. On a GPU JAX takes three quarters of the "
    "memory when it starts, whatever the plan: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 "
    "gives it more, XLA_PYTHON_CLIENT_PREALLOCATE=false lets it take what it needs."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The plan."""

    #: Memory of one device with its unit, like 24GB.
    memory: str = "24GB"
    #: Tokens of the vocabulary; at least 1. None: of --initial-weights or --tokenizer,
    #: else 257 for tiny, which reads bytes, and 32,000 for other models.
    vocabulary_size: AtLeastOne | None = None
    #: Print the plan of one row alone, leaf by leaf: a name from the first column.
    leaves_of: str | None = None
    #: Write the plans to this JSON file too; with --mesh, per_device has the bytes of
    #: one device.
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PlanFlags, Config):
    """Plans the bytes of parameters, gradients and optimizer state of a run.

    It takes the flags of pretrain_llama, and --config. Without --optimizer and --config
    it lists every optimizer, each with those of the flags that it has. With --mesh it
    plans for one of the mesh's devices, whatever devices there are here; data is 1
    unless it is given. What --state-memory keeps on the host is not counted. Other
    flags of devices have no effect.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user's."""
    return run_command(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> None:
    options, given = (
        PRETRAINING.read(argv, Options, "experiments.plan_memory"),
        given_flags(argv),
    )
    check_ranges(options)
    _check_memory(options.memory)
    config = Config(
        **{x.name: getattr(options, x.name) for x in dataclasses.fields(Config)}
    )
    if given & {"optimizer", "config", "resume"}:
        check(config, given)
        runs = {"adamw": adamw_of(config), "this run": config}
    else:
        runs = every_optimizer(config)
        for run in runs.values():
            check(run)
    if options.leaves_of is not None:
        check_choice("--leaves-of", options.leaves_of, runs)
        runs = {options.leaves_of: runs[options.leaves_of]}
    vocab_size = _vocab_size(options)
    said: dict[str, None] = {}
    plans = {name: plan_of(x, vocab_size, said.setdefault) for name, x in runs.items()}
    for line in said:
        print(line)
    if options.leaves_of is None:
        _print_table(plans, plan_of(adamw_of(config), vocab_size), runs, options)
    else:
        print(plans[options.leaves_of])
    if options.json is not None:
        found = {name: plan.to_dict() for name, plan in plans.items()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _check_memory(text: str) -> None:
    try:
        lowrank_optax.budget(text)
    except ValueError as error:
        raise UserError(f"--memory: {error}") from error
    if re.fullmatch(r"[\d._ ]+", text):
        raise UserError(f"--memory {text} has no unit; give one, like {text.strip()}GB")


def _vocab_size(options: Options) -> int:
    if options.vocabulary_size is not None:
        return options.vocabulary_size
    if options.tokenizer is not None or options.initial_weights is not None:
        # Initial weights know their own, which is at least as large.
        return load_tokenizer(options.tokenizer or "bytes").vocab_size
    return 257 if options.model == "tiny" else 32_000


def _print_table(
    plans: Mapping[str, Any], plain: Any, runs: Mapping[str, Config], options: Options
) -> None:
    memory = lowrank_optax.budget(options.memory).limit
    dtype = next(iter(plain.leaves)).dtype
    of_plain = on_a_device(plain)
    is_large = of_plain.parameters >= 1e9
    unit, size_of_unit = ("GB (10^9)", 1e9) if is_large else ("MB (10^6)", 1e6)

    def in_units(size: int) -> str:
        return f"{size / size_of_unit:,.2f}" if size >= 0 else "does not fit"

    where = "" if options.mesh is None else f"one device of --mesh {options.mesh}, "
    if options.state_memory != Config.state_memory:
        where += f"large arrays of the state in {options.state_memory}, "
    table = Table(title=f"LLaMA {options.model_name}, {dtype}, {where}in {unit}")
    table.add_column("optimizer")
    columns = ("parameters", "gradients", "state", "of AdamW's", "left", "left *")
    for name in columns:
        table.add_column(name, justify="right")
    for name, plan in plans.items():
        found = on_a_device(plan)
        left = memory - found.parameters - found.optimizer
        is_inside = gradients_of(runs[name]) == "subspace"
        table.add_row(
            name,
            *map(in_units, (found.parameters, found.gradients, found.optimizer)),
            f"{found.optimizer / of_plain.optimizer:.3f}",
            in_units(left - found.gradients),
            in_units(left - found.subspace_gradients) if is_inside else "",
        )
    console = Console(
        width=None if sys.stdout.isatty() else 120, markup=False, emoji=False
    )
    console.print(table)
    console.print(
        f"left: of {options.memory}. left *: in a step that holds the gradients of "
        "projected matrices inside their subspaces: every step with --refresh sketch, "
        "else those that renew no basis. Without a number: the method looks at full "
        "gradients. of AdamW's: of the state of AdamW without bits.\n"
        f"{_BESIDE}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
