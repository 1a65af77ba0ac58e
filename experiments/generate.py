"""Text from a trained model: ``python -m experiments.generate RUN --prompt ...``."""

import dataclasses
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    from experiments.run.interrupts import leave_at_interrupt

    leave_at_interrupt()

import jax

from experiments.arguments import check_ranges, parse_arguments, run_command
from experiments.errors import UserError
from experiments.model.generate import generate
from experiments.ranges import AtLeastOne, NotNegative, Seed, Share
from experiments.run.load import SourceFlags, load
from experiments.run.printable import continuation, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The text."""

    #: Beginning of the text. Without it the model begins as it begins a document.
    prompt: str = ""
    #: Tokens to add; at least 1.
    tokens: AtLeastOne = 128
    #: Temperature of the draws; 0 takes the likeliest token each time.
    temperature: NotNegative = 0.8
    #: Draw from the likeliest tokens alone that have this probability together; above 0
    #: and at most 1, which is all tokens.
    top_p: Share = 1.0
    #: Seed of the draws. The same seed gives the same text.
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SampleFlags, SourceFlags):
    """Continues a text with a run's model, or with one in Hugging Face's layout.

    The prompt and its continuation go to stdout, and nothing else.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user's."""
    return run_command(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> None:
    options = parse_arguments(Options, "python -m experiments.generate", argv)
    check_ranges(options)
    if options.temperature == 0 and options.top_p < 1:
        raise UserError("--top-p has no effect at --temperature 0; leave it out")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt cannot be encoded as UTF-8 ({error.reason}); give text"
        ) from error
    loaded = load(options)
    tokenizer = loaded.tokenizer
    # Here the end of a document begins the next one.
    is_ours = loaded.config is not None
    start = tokenizer.end_of_document if is_ours else tokenizer.beginning
    prompt = [start, *tokenizer.encode(options.prompt)]
    tokens = generate(
        loaded.model,
        loaded.params,
        prompt,
        options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
    )
    text = continuation(tokenizer, tokens, len(prompt))
    print(printable(options.prompt) + text)


if __name__ == "__main__":
    sys.exit(main())
