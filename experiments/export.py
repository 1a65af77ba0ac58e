"""A trained model as a Hugging Face directory: ``python -m experiments.export``."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    from experiments.run.interrupts import leave_at_interrupt

    leave_at_interrupt()

from experiments.arguments import parse_arguments, run_command
from experiments.model.hugging_face import save_llama
from experiments.run.load import SourceFlags, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Where it goes."""

    #: Directory to write, which must be new or empty.
    out: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ExportFlags, SourceFlags):
    """Writes any checkpoint of a run as a LLaMA in Hugging Face's layout.

    The directory has config.json, model.safetensors and the tokenizer; transformers,
    and --initial-weights of pretrain_llama, read it.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user's."""
    return run_command(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> None:
    options = parse_arguments(Options, "python -m experiments.export", argv)
    loaded = load(options)
    save_llama(options.out, loaded.model, loaded.params, loaded.tokenizer)
    print(f"{loaded.name}: written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
