"""Command lines: a dataclass's fields are flags, a mistake is one line."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from experiments.errors import UserError

Options = TypeVar("Options")


def parse_arguments(
    options: type[Options], program: str, argv: Sequence[str]
) -> Options:
    """Returns the dataclass that the arguments spell; values are not checked.

    Args:
        options: A dataclass; its docstring and its fields' comments are the help.
        program: Name of the command in the help.
        argv: Arguments, without the name.

    Raises:
        UserError: If a flag is unknown or a value is not of its type.
        SystemExit: With status 0, after ``--help``.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            found, unknown = tyro.cli(
                options, prog=program, args=list(argv), return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box, or rules; the first paragraph in it says what is wrong.
        text = re.sub(r"[│╭╮╰╯]", " ", complaint.getvalue().split("\n", 1)[-1])
        paragraphs = (" ".join(part.split()) for part in re.split("[─-]{4,}", text))
        problem = next(filter(None, paragraphs), "the arguments cannot be read")
        raise UserError(f"{problem} (--help lists every flag)") from None
    if unknown:
        names = [flag(field.name) for field in dataclasses.fields(options)]  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"{unknown[0]} is not a flag of this command"
            f"{_nearest(unknown[0], names)} (--help lists every flag)"
        )
    return found


def flag(name: str) -> str:
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def check_choice(
    what: str, value: str, choices: Iterable[str] | Mapping[str, Any]
) -> None:
    """Raises UserError, with the nearest choice, if a value is none of them.

    Args:
        what: Flag that has the value, or what else it is called.
        value: The value.
        choices: What it may be.
    """
    if value not in choices:
        raise UserError(
            f"{what} {value!r} is not known; choose one of {', '.join(choices)}"
            + _nearest(value, choices)
        )


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.split("=")[0], list(choices), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""
