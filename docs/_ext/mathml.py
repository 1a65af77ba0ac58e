"""Formulas as MathML, which browsers draw by themselves: no script, no fonts."""

import html
import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def as_mathml(node: nodes.Element, *, as_block: bool = False) -> str:
    """Returns the MathML of a formula, its text where it is none."""
    text = re.sub(r"\\dots\b", r"\\ldots", node.astext())
    try:
        found = tex2mathml(text, as_block=as_block)
    except MathError as error:
        logger.warning("%s in the formula %s", error, text, location=node)
        return html.escape(text)
    if not re.search(r"\\(left|begin)\b", text):
        # Browsers stretch the bars of a norm, with a superscript to an odd height.
        found = re.sub(r"<mo(?=[^<]*>[‖|]<)", '<mo stretchy="false"', found)
    return found


def _inline(translator, node: nodes.math) -> None:
    translator.body.append(as_mathml(node))
    raise nodes.SkipNode


def _display(translator, node: nodes.math_block) -> None:
    formula = as_mathml(node, as_block=True)
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Makes it a renderer that ``html_math_renderer`` can name."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
