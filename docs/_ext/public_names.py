"""``public-names ROOM ...``: the documentation of what the rooms define."""

import ast
import inspect
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import lowrank_optax


def modules_by_name() -> dict[str, str]:
    """Returns the module that each public name comes from, as ``__init__.py`` says."""
    tree = ast.parse(Path(lowrank_optax.__file__).read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _lines(name: str, module: str) -> list[str]:
    """Returns the reStructuredText that documents a public name."""
    value = getattr(lowrank_optax, name)
    if inspect.isclass(value):
        return [f".. autoclass:: lowrank_optax.{name}", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: lowrank_optax.{name}", ""]
    # autodoc sees the string below an assignment in the assignment's own module alone.
    text = ModuleAnalyzer.for_module(module).find_attr_docs()["", name]
    options = [f".. py:data:: {name}", "   :module: lowrank_optax", ""]
    return [*options, *(f"   {line}" for line in text), ""]


class PublicNames(SphinxDirective):
    """Documents every public name of the rooms that are its arguments."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Returns what autodoc makes of the names, in the order of ``__init__.py``."""
        rooms = self.arguments[0].split()
        lines = ["```{eval-rst}"]
        for name, module in modules_by_name().items():
            if module.split(".")[1] in rooms:
                lines += _lines(name, module)
        return self.parse_text_to_nodes("\n".join([*lines, "```"]))


def _as_markup(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes markup of what a docstring says in plain text."""
    for number, line in enumerate(lines):
        # The star of a shape, (*stack, a, b), would begin an emphasis.
        line = re.sub(r"\(\*(?=\w)", r"(\\*", line)
        # With a dot Sphinx looks for the name in every module.
        lines[number] = re.sub(
            r":(class|func|meth):`(~?)(?=[\w.]+`)", r":\1:`\2.", line
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", _as_markup)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
