"""The figures of the documentation are what their scripts draw, and pages show them."""

import importlib.util
import re

import pytest

if not importlib.util.find_spec("matplotlib"):
    pytest.skip(
        "figures need the packages of the extra experiments", allow_module_level=True
    )

import matplotlib

from docs.figures.__main__ import FIGURES
from docs.figures.losses import rows
from docs.figures.style import DIRECTORY, as_svg, settings

DOCS = DIRECTORY.parent
REDRAW = "draw it anew: python -m docs.figures"


def _texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_its_script_draws_from_the_stored_data(name):
    stored = (DIRECTORY / f"{name}.svg").read_text(encoding="utf-8")
    with settings():
        drawn = as_svg(FIGURES[name]())
    assert _texts(drawn), f"{name} has no text"
    assert _texts(stored) == _texts(drawn), REDRAW
    # Another version of Matplotlib places the same things elsewhere.
    if f"Matplotlib v{matplotlib.__version__}," in stored:
        assert stored == drawn, REDRAW


@pytest.mark.parametrize("name", FIGURES)
def test_a_page_shows_the_figure_with_words_for_who_cannot_see_it(name):
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")]
    shown = rf"```{{figure}} (\.\./)?figures/{name}\.svg\n---\nalt: >-\n  \S"
    assert any(re.search(shown, page) for page in pages)


def test_the_table_of_choose_has_the_numbers_of_the_results():
    page = (DOCS / "choose.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in page.splitlines()]
    table = [row for row in cells if len(row) >= 6 and re.match(r"\d\.\d{3}$", row[1])]
    found = rows()
    adamw = found["adamw"].mean
    expected = {
        (f"{row.block_share:.3f}", f"{row.mean:.3f}"): f"{row.mean / adamw - 1:+.1%}"
        for row in found.values()
    }
    assert len(table) >= 20
    for name, loss, difference, share, *_ in table:
        assert (share, loss) in expected, name
        if difference.strip():
            said = difference.replace(" %", "%")
            assert said == expected[share, loss], name
