"""Command lines: a dataclass's fields are flags, a mistake is one line."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from experiments.errors import UserError, print_error
from experiments.ranges import ranges_of

Options = TypeVar("Options")


def parse_arguments(
    options: type[Options], program: str, argv: Sequence[str]
) -> Options:
    """Returns the dataclass that the arguments spell; values are not checked.

    Args:
        options: A dataclass; its docstring and its fields' comments are the help. The
            bases that it inherits its fields from, if any, are the groups of the help:
            class ``ModelFlags`` is the group "model options", under its docstring.
            They stand in the help as dataclasses order fields: the last base first.
        program: Name of the command in the help.
        argv: Arguments, without the name. Of a flag given twice the last one counts.

    Raises:
        UserError: If a flag is unknown or a value is not of its type.
        SystemExit: With status 0, after ``--help``.
    """
    complaint = io.StringIO()
    groups = groups_of(options)
    try:
        with contextlib.redirect_stderr(complaint):
            found, unknown = tyro.cli(
                _grouped(options, groups) if groups else options,
                prog=program,
                args=list(argv),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
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
        names = map(flag, field_names(options))
        raise UserError(
            f"{unknown[0]} is not a flag of this command"
            f"{nearest(unknown[0], names)} (--help lists every flag)"
        )
    if not groups:
        return found  # pyright: ignore[reportReturnType]
    parts = (getattr(found, name) for name in groups)
    values = {
        name: getattr(part, name) for part in parts for name in field_names(type(part))
    }
    return options(**values)


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a command; returns its exit status.

    0: done; 2: a mistake of the user's, told in one line on stderr; 130: interrupted.
    """
    try:
        command(argv)
    except (UserError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def given_flags(argv: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields whose flags stand in the arguments."""
    flags = (word.split("=")[0] for word in argv if word.startswith("--"))
    names = (re.sub("^--(no-)?", "", word).replace("-", "_") for word in flags)
    return frozenset(names)


def field_names(options: type) -> list[str]:
    """Returns the names of a dataclass's fields, in their order."""
    return [field.name for field in dataclasses.fields(options)]


def flag(name: str) -> str:
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def words_of(fields: Mapping[str, Any]) -> list[str]:
    """Returns the arguments that set these fields."""
    words = []
    for name, value in fields.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            word = str(value)
            # One that begins as a flag does is given in a word with its flag.
            is_apart = not word.startswith("-")
            words += [flag(name), word] if is_apart else [f"{flag(name)}={word}"]
    return words


def check_ranges(options: Any) -> None:
    """Raises UserError if a field is not None and outside of its range."""
    for name, (allows, says) in ranges_of(type(options)).items():
        value = getattr(options, name)
        if value is not None and not allows(value):
            raise UserError(f"{flag(name)} must be {says}, not {value}")


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
            + nearest(value, choices)
        )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns the question whether the most similar choice is meant, or nothing."""
    close = difflib.get_close_matches(word.split("=")[0], list(choices), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def groups_of(options: type) -> dict[str, type]:
    """Returns the bases that have fields of their own, by the name of the group.

    A base of another one, which has its fields with other defaults, is no group.
    """
    found: list[type] = [
        base
        for base in reversed(options.__mro__[1:])
        if dataclasses.is_dataclass(base) and inspect.get_annotations(base)
    ]
    bases = [x for x in found if sum(issubclass(base, x) for base in found) == 1]
    names = (re.sub("(?<!^)(?=[A-Z])", "_", base.__name__).lower() for base in bases)
    return {
        name.removesuffix("_flags"): base
        for name, base in zip(names, bases, strict=True)
    }


def _grouped(options: type, groups: Mapping[str, type]) -> type:
    """Returns a dataclass with one field for each group, which tyro knows to show."""
    fields = [
        (name, group, dataclasses.field(default_factory=group))
        for name, group in groups.items()
    ]
    return dataclasses.make_dataclass(
        options.__name__, fields, namespace={"__doc__": options.__doc__}
    )
