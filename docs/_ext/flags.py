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


class Flags(SphinxDirective):
    """Documents the flags of a dataclass, group by group."""

    required_arguments = 1
    option_spec: typing.ClassVar = {"command": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Returns a section for each group, if there are any, or the flags."""
        module, _, name = self.arguments[0].rpartition(".")
        options = getattr(importlib.import_module(module), name)
        lines = []
        for group in groups_of(options).values():
            words = re.findall("[A-Z][a-z]*", group.__name__.removesuffix("Flags"))
            lines += [f"### {' '.join(words).capitalize()}", "", group.__doc__ or ""]
            lines += ["", *self._flags(group)]
        text = "\n".join(lines or self._flags(options))
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def _flags(self, group: type) -> Iterator[str]:
        """Yields Markdown that documents the fields of one group."""
        hints = typing.get_type_hints(group, include_extras=True)
        yield "```{eval-rst}"
        yield f".. program:: {self.options['command']}"
        yield ""
        for field in dataclasses.fields(group):
            # A base has the flags whose defaults are those of another command too.
            own = next(
                x for x in group.__mro__ if field.name in inspect.get_annotations(x)
            )
            yield from _option(own, field, list(_parts(hints[field.name])))
        yield "```"


def _option(group: type, field: dataclasses.Field, parts: list[Any]) -> Iterator[str]:
    """Yields reStructuredText that documents one field.

    Args:
        group: Dataclass that annotates the field.
        field: The field.
        parts: What its type is made of.
    """
    choices = [
        str(choice)
        for part in parts
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    given = next((x for x in parts if hasattr(x, "metavar")), None)
    if given is not None and (given.metavar or "").startswith("{"):
        choices = given.metavar.strip("{}").split(",")
    if bool in parts:
        names = f"{flag(field.name)}, {flag('no_' + field.name)}"
    elif tyro.conf.Positional in parts:
        names = field.name.upper()
    else:
        kinds = [x.__name__ for x in parts if x in (int, float, str, Path)]
        names = f"{flag(field.name)} {kinds[0].upper() if kinds else 'CHOICE'}"
    if given is not None and given.help:
        first, *items = given.help.splitlines()
    else:
        docs = ModuleAnalyzer.for_module(group.__module__).find_attr_docs()
        first, items = " ".join(docs[group.__name__, field.name]).strip(), []
    if choices and not items:
        first += f" One of {', '.join(choices)}."
    if isinstance(field.default, bool):
        first += f" Default: {'on' if field.default else 'off'}."
    elif field.default not in (None, dataclasses.MISSING):
        first += f" Default: {field.default}."
    yield f".. option:: {names}"
    yield ""
    yield f"   {_markup(first)}"
    yield ""
    for item in items:
        name, _, text = item.partition(": ")
        yield f"   * **{escape(name)}**: {_markup(text)}"
    yield ""


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


def _markup(text: str) -> str:
    """Returns reStructuredText that says a text as it is, its flags as code."""
    between = map(escape, _FLAG.split(text))
    flags = (f"``{name}``\\ " for name in _FLAG.findall(text))
    return "".join(x for pair in zip(between, [*flags, ""], strict=True) for x in pair)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("flags", Flags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
