"""The flags of a comparison, with their checks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.arguments import check_choice, parse_arguments
from experiments.comparison.suites import SUITES
from experiments.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares methods: equal data, equal search over two learning rates, seeds.

    Ctrl-C stops a comparison. The same command continues a stopped comparison.
    """

    #: The comparison to run.
    suite: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="{" + ",".join(SUITES) + "}")
    ]
    #: Directory of the results. None: runs/compare-SUITE.
    out: Path | None = None
    #: Text to train on, named as for pretrain_llama. None: the data of the suite,
    #: embedded for the tiny model, c4 for larger models.
    data: str | None = None
    #: Text to validate on. None: the validation part of the data, or a part held out
    #: from --data.
    validation_data: str | None = None
    #: bytes, or the path of a SentencePiece .model or of a tokenizer.json. Models above
    #: tiny need such a path.
    tokenizer: str = "bytes"
    #: Runs at a time. On CPUs each run has its share of the cores, which lowers tokens
    #: per second.
    jobs: int = 1
    #: Methods to run, separated by commas. None: all methods of the suite. The table
    #: has all finished methods.
    only: str | None = None
    #: Directory of another comparison. The runs take the best rates found there, and
    #: search nothing. Use it for other data than the data of the search.
    rates_from: Path | None = None


def parse_options(argv: Sequence[str]) -> Options:
    """Returns the options in the arguments, each value checked.

    Raises:
        UserError: If a flag or a value is unknown.
        SystemExit: With status 0, after ``--help``.
    """
    options = parse_arguments(Options, "python -m experiments.compare", argv)
    check_choice("suite", options.suite, SUITES)
    names = [contender.name for contender in SUITES[options.suite].contenders]
    for name in chosen_names(options):
        check_choice("--only", name, names)
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    suite = SUITES[options.suite]
    if suite.needs_tokenizer and options.tokenizer == "bytes":
        raise UserError(
            f"{options.suite} needs --tokenizer, the path of a SentencePiece .model or "
            "of a tokenizer.json; its model was made for about 32,000 tokens"
        )
    return dataclasses.replace(options, data=options.data or suite.data)


def chosen_names(options: Options) -> list[str]:
    """Returns the names of the methods to run."""
    if options.only is None:
        return [contender.name for contender in SUITES[options.suite].contenders]
    return [name.strip() for name in options.only.split(",")]
