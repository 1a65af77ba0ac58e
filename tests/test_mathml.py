"""Formulas of the site: what browsers would draw wrong, and what nobody can draw."""

import importlib.util
import logging

import pytest

from tests.pages import DOCS

pytest.importorskip("sphinx", reason="the site needs the extra docs")

nodes = pytest.importorskip("docutils.nodes")
spec = importlib.util.spec_from_file_location("mathml", DOCS / "_ext/mathml.py")
mathml = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mathml)


def test_bars_beside_a_superscript_have_one_height():
    found = mathml.as_mathml(nodes.math(text=r"\lVert G \rVert^2"))
    assert found.count('stretchy="false"') == 2
    stretched = mathml.as_mathml(nodes.math(text=r"\left\lVert G \right\rVert^2"))
    assert "stretchy" not in stretched


def test_what_is_no_formula_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        found = mathml.as_mathml(nodes.math(text=r"a < \nosuch"))
    assert found == r"a &lt; \nosuch"
    assert "nosuch" in caplog.text
