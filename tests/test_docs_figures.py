"""The figures of the documentation are what their scripts draw, and pages show them."""

import json
import re

import matplotlib
import numpy as np
import pytest

from docs.figures.__main__ import FIGURES
from docs.figures.losses import rows, rows_of_suite
from docs.figures.style import DIRECTORY, STATES, as_svg, settings

DOCS = DIRECTORY.parent
REDRAW = "draw it anew: python -m docs.figures"


def _texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def _numbers(svg: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+", svg)]


def _shape(svg: str) -> str:
    """Returns an SVG without numbers, nor the identifiers that are made of them."""
    return re.sub(r"-?\d+(\.\d+)?|(?<=[\"#])[mpC][0-9a-f]{6,}\w*", "0", svg)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_its_script_draws_from_the_stored_data(name):
    stored = (DIRECTORY / f"{name}.svg").read_text(encoding="utf-8")
    with settings():
        drawn = as_svg(FIGURES[name]())
    assert _texts(drawn), f"{name} has no text"
    assert _texts(stored) == _texts(drawn), REDRAW
    # Another version of Matplotlib places the same things elsewhere.
    if f"Matplotlib v{matplotlib.__version__}," not in stored:
        return
    assert _shape(stored) == _shape(drawn), REDRAW
    # In points; another processor rounds otherwise, far below what an eye sees.
    np.testing.assert_allclose(_numbers(stored), _numbers(drawn), atol=0.02)


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


@pytest.mark.parametrize(
    ("page", "suite"),
    {
        "concepts/refresh": "ablation-interval",
        "concepts/rebasing": "ablation-rebase",
        "concepts/subspace": "ablation-side",
        "methods/vlorp": "ablation-granularity",
    }.items(),
)
def test_a_page_has_each_loss_of_the_ablation_that_it_names(page, suite):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for method, row in rows_of_suite(suite).items():
        assert f"{row.mean:.3f}" in text, (method, row.mean)


def test_what_was_measured_of_the_states_is_possible():
    measured = json.loads(STATES.read_text(encoding="utf-8"))
    for shares in measured["subspace"]["captured"].values():
        assert shares == sorted(shares)
    refresh = measured["refresh"]
    pairs = zip(refresh["in_use"], refresh["best"], strict=True)
    assert all(in_use <= best for in_use, best in pairs)
    residual = measured["residual"]
    assert all(residual["least"][x] <= y for x, y in residual["outside"].items())
    capacity = measured["capacity"]
    used = map(max, capacity["ranks"])
    assert all(x <= y for x, y in zip(used, capacity["capacities"], strict=True))
