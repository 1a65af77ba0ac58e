"""``flags MODULE.CLASS``: every flag of a command, from the dataclass that it reads."""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.rst import escape

from experiments.arguments import flag, groups_of

_FLAG = re.compile(r"(?<![\w`])--[a-z][\w-]*")


def _markup(text: str) -> str:
    """Returns reStructuredText that says a text as it is, its flags as code."""
    between = map(escape, _FLAG.split(text))
    flags = (f"``{name}``\\ " for name in _FLAG.findall(text))
    return "".join(x for pair in zip(between, [*flags, ""], strict=True) for x in pair)


def _parts(hint: Any) -> Iterator[Any]:
    """Yields what ``Annotated`` and ``|`` of a type are made of."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from hint.__metadata__
        yield from _parts(hint.__origin__)
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield hint


class _Flag:
    """One field of a dataclass as a flag.

    Attributes:
        names: Of the flag, as a command line has them, with what follows.
        paragraphs: What it is, in plain text.
    """

    def __init__(self, options: type, field: dataclasses.Field):
        hint = typing.get_type_hints(options, include_extras=True)[field.name]
        parts = list(_parts(hint))
        own = next((x for x in parts if hasattr(x, "metavar")), None)
        choices = [
            str(choice)
            for part in parts
            if typing.get_origin(part) is typing.Literal
            for choice in typing.get_args(part)
            if choice is not None
        ]
        if own is not None and own.metavar:
            choices = own.metavar.strip("{}").split(",")
        self.names = self._names(field.name, parts, choices)
        text = own.help if own is not None and own.help else ""
        self.paragraphs = text.splitlines() or [_comment(options, field.name)]
        if choices and not text:
            self.paragraphs.append(f"One of {', '.join(choices)}.")
        if field.default not in (None, dataclasses.MISSING):
            self.paragraphs.append(f"Default: {_spelled(field.default)}.")

    @staticmethod
    def _names(name: str, parts: list, choices: list[str]) -> str:
        if bool in parts:
            return f"{flag(name)}, {flag('no_' + name)}"
        if tyro.conf.Positional in parts:
            return name.upper()
        kinds = [part for part in parts if part in (int, float, str, Path)]
        kind = "CHOICE" if choices else kinds[0].__name__.upper()
        return f"{flag(name)} {kind}"


def _comment(options: type, name: str) -> str:
    """Returns the comment above a field, which tyro shows too."""
    for base in options.__mro__:
        if name in inspect.get_annotations(base):
            docs = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            return " ".join(docs[base.__name__, name]).strip()
    raise LookupError(name)


def _spelled(default: Any) -> str:
    return (
        {True: "on", False: "off"}.get(default, default)
        if isinstance(default, bool)
        else str(default)
    )


class Flags(SphinxDirective):
    """Documents the flags of a dataclass, group by group."""

    required_arguments = 1
    option_spec: typing.ClassVar = {"command": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Returns a section for each group, if there are any, or the flags."""
        module, _, name = self.arguments[0].rpartition(".")
        options = getattr(importlib.import_module(module), name)
        lines = ["```{eval-rst}", f".. program:: {self.options['command']}", ""]
        for group in groups_of(options).values() or [options]:
            lines += self._group(group, options)
        return self.parse_text_to_nodes("\n".join([*lines, "```"]))

    def _group(self, group: type, options: type) -> Iterator[str]:
        if group is not options:
            words = re.findall("[A-Z][a-z]*", group.__name__.removesuffix("Flags"))
            yield f".. rubric:: {' '.join(words).capitalize()}"
            yield ""
            yield _markup(inspect.cleandoc(group.__doc__ or ""))
            yield ""
        own = inspect.get_annotations(group)
        for field in dataclasses.fields(group):
            if field.name in own:
                one = _Flag(group, field)
                yield f".. option:: {one.names}"
                yield ""
                for paragraph in one.paragraphs:
                    yield f"   {_markup(paragraph)}"
                    yield ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("flags", Flags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
