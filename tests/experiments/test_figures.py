"""The figures hold the numbers that were logged."""

import pytest
from matplotlib.figure import Figure

from experiments.run import figures

MEMORY = {"parameters": 4e6, "basis": 0, "block moments": 2e6}
SUMMARY = {
    "optimizer": "galore",
    "model": "tiny",
    "initial_validation_loss": 5.0,
    "memory": {**MEMORY, "basis": 1e6},
    "adamw_memory": MEMORY,
}
RECORDS = [
    {"step": 0, "validation_loss": 5.0},
    {"step": 1, "loss": 5.0, "ranks": {"blocks/mlp/up": [2, 3], "head": 4}},
    {"step": 9, "loss": None, "ranks": {"blocks/mlp/up": [5, 6], "head": 7}},
    {"step": 10, "loss": 3.0, "ranks": {"blocks/mlp/up": [5, 6], "head": 7}}
    | {"validation_loss": 3.5},
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws into a directory; returns the files by name and the Figures in order."""
    kept = []
    original = Figure.__init__

    def init(self, *args, **kwargs):
        kept.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "__init__", init)
    directory = tmp_path / "figures"

    def draw(records):
        files = figures.draw_figures(directory, records, SUMMARY)
        return {path.name: path for path in files}, kept

    return draw


def test_files_are_images_and_ranks_are_drawn_only_if_they_differ(drawn):
    files, _ = drawn(RECORDS)
    assert files.keys() == {"loss.png", "memory.png", "ranks.png"}
    for path in files.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    equal = {"step": 1, "loss": 5.0, "ranks": {"up": [4, 4], "head": 4}}
    files, _ = drawn([RECORDS[0], equal])
    assert files.keys() == {"loss.png", "memory.png"}
    files, _ = drawn([RECORDS[0], {"step": 1, "loss": 5.0, "validation_loss": 4.0}])
    assert files.keys() == {"loss.png", "memory.png"}


def test_the_validation_curve_begins_before_the_first_step(drawn):
    _, (loss, *_) = drawn(RECORDS)
    training, validation = loss.axes[0].lines
    assert training.get_xdata().tolist() == [1, 9, 10]
    assert list(validation.get_xdata()) == [0, 10]
    assert list(validation.get_ydata()) == [5.0, 3.5]


def test_ranks_are_coloured_by_layer_and_step_over_the_whole_figure(drawn):
    _, (*_, ranks) = drawn(RECORDS)
    drawn_ranks = {
        axes.get_title(): axes.collections[0] for axes in ranks.axes if axes.get_title()
    }
    head, up = drawn_ranks["head: 4 to 7"], drawn_ranks["mlp/up: 2 to 6"]
    assert head.get_array().tolist() == [[4, 7, 7]]
    assert up.get_array().tolist() == [[2, 5, 5], [3, 6, 6]]
    # One scale, from the lowest rank to the highest.
    assert head.get_clim() == up.get_clim() == (2, 7)
    for axes in ranks.axes[:2]:
        assert axes.get_xlim() == (0, 10)


def test_the_bars_are_as_long_as_the_bytes(drawn):
    _, (_, memory, _) = drawn(RECORDS)
    ends = {}
    for bar in memory.axes[0].patches:
        ends[bar.get_y()] = bar.get_x() + bar.get_width()
    assert sorted(ends.values()) == [6.0, 7.0]
    assert {text.get_text() for text in memory.axes[0].texts} == {"6.00", "7.00"}
