"""The tables of the page about memory and speed are what the result files say."""

import copy

import pytest

from benchmarks import tables

PAGES = {path.name: path.read_text(encoding="utf-8") for path in tables.PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_what_the_files_have(name):
    message = "run python -m benchmarks.tables, and read what the page says of it"
    assert tables.filled(PAGES[name]) == PAGES[name], message
    assert "<!-- table: " in PAGES[name]


def test_every_table_is_on_a_page():
    for name in tables.TABLES:
        assert any(f"<!-- table: {name} -->" in page for page in PAGES.values()), name


@pytest.fixture
def changed(monkeypatch):
    """Measurements in which the H100 needed twice its time for every step."""
    read = tables.measurements

    def slower(name):
        found = copy.deepcopy(read(name))
        if name == "accelerator-h100/b-step":
            for result in found.values():
                if "milliseconds" in result:
                    result["milliseconds"]["median"] *= 2
        return found

    monkeypatch.setattr(tables, "measurements", slower)


@pytest.mark.usefixtures("changed")
def test_another_measurement_is_another_page():
    page = PAGES["memory_and_speed.md"]
    assert tables.filled(page) != page


def test_what_was_not_measured_is_said():
    rows = list(tables.step_accelerator())
    row = next(x for x in rows if x[:2] == ["1b adamw, full gradients", "H100"])
    assert row[2] == tables.NOTHING
    assert not any(row[3:])


def test_times_of_two_runs_are_not_divided_by_one_another(monkeypatch):
    read = tables.measurements

    def without_adamw(name):
        found = copy.deepcopy(read(name))
        if name == "accelerator-h200-third/b-step":
            del found["350m adamw, full gradients"]
        return found

    monkeypatch.setattr(tables, "measurements", without_adamw)
    rows = list(tables.step_accelerator())
    row = next(x for x in rows if x[:2] == ["350m sumo, subspace gradients", "H200"])
    assert row[2] != tables.NOTHING
    assert row[3] == ""
