"""The flags of a comparison, with their checks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.arguments import check_choice, check_ranges, parse_arguments
from experiments.comparison.suite import Suite
from experiments.comparison.suites import SUITES
from experiments.comparison.trainers import TUNER
from experiments.errors import UserError
from experiments.ranges import AtLeastOne
from experiments.tuning.fit import find_model_for


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
    #: What to train on. Text, named as for pretrain_llama; or examples, named as for
    #: finetune, or a directory with the files TASK_train and TASK_validation. None: the
    #: data of the suite: c4 for c4-* and papers-*, embedded for other pre-training,
    #: GLUE or GSM8K of the Hugging Face hub for fine-tuning.
    data: str | None = None
    #: What to validate on. None: the validation part of the data, or a part held out
    #: from --data.
    validation_data: str | None = None
    #: bytes, or the path of a SentencePiece .model or of a tokenizer.json. c4-* and
    #: papers-* need such a path. In fine-tuning the model brings its own.
    tokenizer: str = "bytes"
    #: Model to tune, named as for finetune. None: that of the suite. Some suites have
    #: none, and need it.
    model: str | None = None
    #: Updates of each run; at least 1. None: those of the suite.
    steps: AtLeastOne | None = None
    #: Tasks to run, separated by commas, of a suite with several. None: all. The joined
    #: table has all tasks with results.
    tasks: str | None = None
    #: Runs at a time; at least 1. On CPUs each run has its share of the cores, which
    #: lowers tokens per second.
    jobs: AtLeastOne = 1
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
    suite = SUITES[options.suite]
    names = [contender.name for contender in suite.contenders]
    for name in chosen_names(options):
        check_choice("--only", name, names)
    check_ranges(options)
    _check_tasks(options, suite)
    if suite.trainer is TUNER:
        _check_tuning(options, suite)
    elif options.model is not None:
        raise UserError(
            f"--model has no effect: {options.suite} pre-trains the model of its name; "
            "leave it out"
        )
    if suite.needs_tokenizer and options.tokenizer == "bytes":
        raise UserError(
            f"{options.suite} needs --tokenizer, the path of a SentencePiece .model or "
            "of a tokenizer.json; its model was made for about 32,000 tokens"
        )
    return dataclasses.replace(options, data=options.data or suite.data)


def suite_of(options: Options) -> Suite:
    """Returns the suite, with the steps and the model of the options."""
    return SUITES[options.suite].changed(steps=options.steps, model=options.model)


def chosen_names(options: Options) -> list[str]:
    """Returns the names of the methods to run."""
    if options.only is None:
        return [contender.name for contender in SUITES[options.suite].contenders]
    return [name.strip() for name in options.only.split(",")]


def chosen_tasks(options: Options) -> list[str]:
    """Returns the names of the tasks to run."""
    if options.tasks is None:
        return [task.name for task in SUITES[options.suite].tasks]
    return [name.strip() for name in options.tasks.split(",")]


def _check_tasks(options: Options, suite: Suite) -> None:
    if not suite.tasks and options.tasks is not None:
        raise UserError(
            f"--tasks has no effect: {options.suite} has one task; leave it out"
        )
    for name in chosen_tasks(options):
        check_choice("--tasks", name, [task.name for task in suite.tasks])
    if suite.tasks and options.validation_data is not None:
        raise UserError(
            f"--validation-data has no effect: {options.suite} has several tasks, each "
            "with TASK_validation in the directory --data; leave it out"
        )
    data = options.data
    if suite.tasks and data not in (None, suite.data) and not Path(data).is_dir():
        raise UserError(
            f"--data {data} is no directory; {options.suite} has several tasks: give a "
            f"directory with TASK_train and TASK_validation, or {suite.data}"
        )


def _check_tuning(options: Options, suite: Suite) -> None:
    if options.tokenizer != "bytes":
        raise UserError(
            "--tokenizer has no effect: the model brings its own; leave it out"
        )
    if suite.needs_model and options.model is None:
        raise UserError(
            f"{options.suite} needs --model, a directory in Hugging Face's layout"
        )
    if options.data is None and suite.data is None:
        raise UserError(
            f"{options.suite} needs --data, a file of examples, or a directory with "
            f"{suite.flags['task']}_train.jsonl and {suite.flags['task']}_validation"
            ".jsonl"
        )
    flags = {**suite.flags, **(suite.tasks[0].flags if suite.tasks else {})}
    # Not by the first run, which would write it to its log.
    find_model_for(flags["task"], options.model or flags["model"])
