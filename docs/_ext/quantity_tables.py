"""``quantities MODULE.NAME``: what a run writes, from the place that lists it."""

import importlib
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments.run.quantities import markdown_table


class Quantities(SphinxDirective):
    """Shows quantities, such as ``LINE`` of :mod:`experiments.run.quantities`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        module, _, name = self.arguments[0].rpartition(".")
        table = markdown_table(getattr(importlib.import_module(module), name))
        return self.parse_text_to_nodes(re.sub(r"(--[a-z][\w-]*)", r"`\1`", table))


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("quantities", Quantities)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
