"""Docstrings name what they must.

Their examples are run by ``pytest --doctest-modules lowrank_optax``.
"""

import ast
import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import pytest

import lowrank_optax

PUBLIC = {name: getattr(lowrank_optax, name) for name in lowrank_optax.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
RECORDS = [
    name
    for name, value in PUBLIC.items()
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields")
]


def _section(docstring: str, title: str) -> str:
    """Returns the indented text under ``title:``."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    return found.group(1) if found else ""


def _entries(section: str) -> list[str]:
    """Returns the names that a section explains, in order; some share an entry."""
    entries = re.findall(r"^ {4}(\w+(?:,\s+\w+)*):", section, re.MULTILINE)
    return [name for entry in entries for name in re.split(r",\s+", entry)]


def _references(section: str) -> dict[str, str]:
    """Returns the names that a section leaves to another function, with its name."""
    entries = re.findall(
        r"^ {4}(\w+(?:,\s+\w+)*):\s+see :func:`(\w+)`\.$", section, re.MULTILINE
    )
    return {
        name: function
        for entry, function in entries
        for name in re.split(r",\s+", entry)
    }


def _documented_assignments() -> set[str]:
    """Returns the module-level names of the library that a string follows."""
    found = set()
    for path in Path(lowrank_optax.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, following in itertools.pairwise(body):
            is_text = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            if is_text and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = getattr(node, "targets", None) or [node.target]
                found |= {ast.unparse(target) for target in targets}
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_of_its_own(name):
    value = PUBLIC[name]
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        assert name in _documented_assignments()
        return
    # Those that NamedTuple and dataclass write themselves are no sentences.
    first_line = inspect.getdoc(value).splitlines()[0]
    assert first_line.endswith("."), first_line


@pytest.mark.parametrize("name", FUNCTIONS)
def test_args_explains_every_parameter_in_its_order(name):
    function = PUBLIC[name]
    parameters = list(inspect.signature(function).parameters)
    section = _section(inspect.getdoc(function), "Args")
    assert _entries(section) == parameters
    # A method leaves them to its transformation, which explains them, and in words.
    for parameter, other in _references(section).items():
        assert other == f"scale_by_{name}"
        explained = _section(inspect.getdoc(PUBLIC[other]), "Args")
        assert parameter in _entries(explained)
        assert parameter not in _references(explained)


def test_a_list_of_names_is_an_entry_for_each():
    section = "    a: One.\n    b, c: see :func:`f`.\n"
    section += "    d,\n    e:\n        see :func:`g`.\n"
    assert _entries(section) == ["a", "b", "c", "d", "e"]
    assert _references(section) == {"b": "f", "c": "f", "d": "g", "e": "g"}


@pytest.mark.parametrize("name", RECORDS)
def test_attributes_explains_every_field_in_its_order(name):
    record = PUBLIC[name]
    fields = getattr(record, "_fields", None) or [
        field.name for field in dataclasses.fields(record)
    ]
    documented = _entries(_section(inspect.getdoc(record), "Attributes"))
    assert documented == list(fields)
