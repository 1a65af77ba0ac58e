"""Loss of a trained model on any text: ``python -m experiments.evaluate RUN``."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    from experiments.run.interrupts import leave_at_interrupt

    leave_at_interrupt()

from rich.console import Console

from experiments.arguments import check_ranges, parse_arguments, run_command
from experiments.data.packing import Windows, padded_batches
from experiments.data.pipeline import make_data, read_text
from experiments.distribution.mesh import make_mesh
from experiments.distribution.placement import replicate, shard_batch
from experiments.errors import UserError
from experiments.model.llama import apply
from experiments.ranges import AtLeastOne
from experiments.run.load import Loaded, SourceFlags, load
from experiments.run.perplexity import bits_per_byte, perplexity
from experiments.run.step import make_eval_step, mean_loss, summed_token_loss

# Tokens per sequence of a model from elsewhere, at most.
_LONGEST = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFlags:
    """The text, and how it is read."""

    #: Text to evaluate on, all of it: a path, folder or glob, c4, hub:owner/name, or
    #: embedded. Of the last three it is the validation part. None: the text that the
    #: run validates on.
    data: str | None = None
    #: Column of JSON lines, Parquet and data sets of the hub that holds the text. None:
    #: that of the run, else text.
    text_column: str | None = None
    #: Most tokens to evaluate on; at least 1. None: as many as the run validates on, or
    #: all of --data.
    tokens: AtLeastOne | None = None
    #: Tokens per sequence; at least 1. Each sequence is predicted without those before.
    #: None: that of the run, or as many as the model is made for, at most 1024.
    sequence_length: AtLeastOne | None = None
    #: Sequences at a time, over all devices; a multiple of their number.
    batch_size: AtLeastOne = 8
    #: Write the numbers to this JSON file too.
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(TextFlags, SourceFlags):
    """Evaluates a run's model, or one in Hugging Face's layout, on a text.

    It prints the mean loss in nats per token, the perplexity, bits per byte of UTF-8
    and the number of tokens.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user's."""
    return run_command(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> None:
    options = parse_arguments(Options, "python -m experiments.evaluate", argv)
    check_ranges(options)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its directory is not there; make it")
    console = Console(stderr=True, markup=False, emoji=False)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    found = evaluate(options, load(options), say)
    print(f"model          {found['model']}")
    print(f"text           {found['text']}")
    print(f"loss           {found['loss']:.4f} nats per token")
    print(f"perplexity     {found['perplexity']:,.2f}")
    if found["bits_per_byte"] is not None:
        print(f"bits per byte  {found['bits_per_byte']:.4f}")
    print(f"tokens         {found['tokens']:,}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def evaluate(
    options: Options, loaded: Loaded, report: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the numbers of a model on a text, and the names of both.

    Args:
        options: Checked.
        loaded: The model.
        report: Called with lines of progress.

    Raises:
        UserError: If there is no text, or it cannot be read.
    """
    config = loaded.config
    length = options.sequence_length
    if length is None:
        longest = min(loaded.model.max_positions, _LONGEST)
        length = config.sequence_length if config else longest
    mesh = make_mesh(None, options.batch_size)
    name, windows, ratio = _text(options, loaded, length, report)
    wanted = options.tokens
    if wanted is None and config is not None and options.data is None:
        wanted = config.eval_tokens
    tokens = min(wanted or windows.target_count, windows.target_count)
    forward = functools.partial(apply, loaded.model)
    eval_step = make_eval_step(functools.partial(summed_token_loss, forward), mesh)
    params = replicate(loaded.params, mesh)
    batches = padded_batches(windows, options.batch_size, tokens)
    loss = mean_loss(eval_step(params, shard_batch(batch, mesh)) for batch in batches)
    return {
        "model": loaded.name,
        "text": name,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, ratio),
        "tokens": tokens,
    }


def _text(options, loaded, length, report) -> tuple[str, Windows, float]:
    """Returns the name of a text, its windows, and its bytes per token."""
    config = loaded.config
    column = options.text_column or (config.text_column if config else "text")
    if options.data is not None:
        name, text = read_text(
            options.data, loaded.tokenizer, column, options.tokens, report
        )
        count = len(text.tokens)
        ratio = text.bytes_between(0, count) / count
        return name, Windows(text.tokens, length), ratio
    if config is None:
        raise UserError(
            f"{options.source} is no run, and has no text of its own; give --data"
        )
    data = make_data(
        config.data,
        loaded.tokenizer,
        batch_size=options.batch_size,
        sequence_length=length,
        seed=config.seed,
        validation_spec=config.validation_data,
        text_column=column,
        report=report,
    )
    name = data.description.splitlines()[-1].removeprefix("validation: ")
    return name, data.validation_windows, data.bytes_per_token


if __name__ == "__main__":
    sys.exit(main())
