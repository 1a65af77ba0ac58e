"""The flags of a comparison and what they may be."""

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

    Stop it with Ctrl-C and give the same command again: it goes on where it was.
    """

    #: Which comparison.
    suite: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="{" + ",".join(SUITES) + "}")
    ]
    #: Directory of the results. None: runs/compare-SUITE.
    out: Path | None = None
    #: Text to train on, as pretrain_llama names it. None: what the
    #: suite is about, embedded for the tiny model, c4 for larger ones.
    data: str | None = None
    #: Text to validate on. None: the data's own part, or one held out from --data.
    validation_data: str | None = None
    #: bytes, or the path of a SentencePiece .model or of a tokenizer.json, which models
    #: above tiny need.
    tokenizer: str = "bytes"
    #: Runs at a time; on CPUs each has its share of the cores, which tokens per second
    #: show.
    jobs: int = 1
    #: Methods to run, separated by commas. None: all of the suite. The table has all
    #: that are done.
    only: str | None = None
    #: Directory of another comparison: the best rates found there are taken, and
    #: nothing is searched. For other data than those that chose the rates.
    rates_from: Path | None = None


def parse_options(argv: Sequence[str]) -> Options:
    """Returns the options that the arguments spell, each value checked.

    Raises:
        UserError: If a flag or a value is not one of ours.
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
            "of a tokenizer.json; about 32,000 tokens are what its model was made for"
        )
    return dataclasses.replace(options, data=options.data or suite.data)


def chosen_names(options: Options) -> list[str]:
    """Returns the names of the methods to run."""
    if options.only is None:
        return [contender.name for contender in SUITES[options.suite].contenders]
    return [name.strip() for name in options.only.split(",")]
