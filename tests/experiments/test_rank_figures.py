"""The figures of ranks hold the ranks, bytes and spectra that were found."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.run import rank_figures
from experiments.run.rank_figures import (
    first_spectra_figure,
    rank_by_layer,
    state_bytes,
)

RECORDS = [
    {"step": 0, "validation_loss": 5.0},
    *(
        {
            "step": step,
            "ranks": {"blocks/mlp/up/kernel": up, "pooler/kernel": pooler},
            "optimizer_state_bytes": size,
        }
        for step, up, pooler, size in (
            (1, [8, 8], 8, 9000),
            (10, [8, 5], 6, 9000),
            (20, [7, 5], 6, 8000),
        )
    ),
]
SUMMARY = {
    "model": "minilm",
    "optimizer": "adarankgrad",
    "optimizer_state_bytes": 8000,
    "block_state_bytes": 3000,
    "compactions": [{"step": 10, "bytes_before": 9000, "bytes_after": 8000}],
}
SPECTRA = {
    "blocks/mlp/up/kernel": np.array([[4, 2, 1.0], [3, 0, 0]]),
    "pooler/kernel": np.array([[1, 1, 1.0]]),
}


def xs(line) -> list:
    return np.asarray(line.get_xdata()).tolist()


def ys(line) -> list:
    return np.asarray(line.get_ydata()).tolist()


def test_a_panel_is_a_kind_of_matrix_and_a_line_is_a_layer():
    up, pooler, *_ = rank_by_layer(RECORDS[1:]).axes
    assert (up.get_title(), pooler.get_title()) == ("mlp/up", "pooler")
    lines = [ys(line) for line in up.lines]
    assert lines == [[8, 8, 7], [8, 5, 5]]
    assert xs(up.lines[0]) == [1, 10, 20]
    assert [ys(line) for line in pooler.lines] == [[8, 6, 6]]
    # A layer has its colour in all panels, and one scale serves all.
    first, second = (to_hex(line.get_color()) for line in up.lines)
    assert to_hex(pooler.lines[0].get_color()) == first != second
    assert up.get_ylim() == pooler.get_ylim() == (0, pytest.approx(8.64))


def test_bytes_are_those_of_the_block_matrices_and_compactions_are_marked():
    axes, beside = state_bytes(RECORDS[1:], SUMMARY).axes
    sizes, compaction = axes.lines
    assert ys(sizes) == [4.0, 4.0, 3.0]  # kB
    assert xs(compaction) == [10, 10]
    assert ys(beside.lines[0]) == pytest.approx([8, 19 / 3, 6])


def test_spectra_rise_to_one_and_the_needed_ranks_are_dots():
    up, pooler, *_ = first_spectra_figure(SPECTRA, 0.2).axes
    first, second, threshold, *dots = up.lines
    assert ys(first) == pytest.approx([16 / 21, 20 / 21, 1])
    assert ys(second) == [1, 1, 1]
    assert ys(threshold) == [0.8, 0.8]
    assert [xs(dot) for dot in dots] == [[2], [1]]
    assert xs(pooler.lines[-1]) == [3]
    assert len(first_spectra_figure(SPECTRA, None).axes[0].lines) == 2


def test_what_does_not_change_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_figures, "write_figures", lambda _, found: list(found))

    def names(records, **found):
        return rank_figures.draw_rank_figures(tmp_path, records, SUMMARY, **found)

    assert names(RECORDS) == ["rank_by_layer.png", "state_bytes.png"]
    assert names(RECORDS[:2]) == []
    assert names(RECORDS[:1], spectra=SPECTRA) == ["first_spectra.png"]
    # Adapters have no ranks.
    bare = [{"step": 1, "optimizer_state_bytes": 9000, "ranks": {}}]
    assert names(bare, spectra={}) == []


def test_the_files_are_images(tmp_path):
    files = rank_figures.draw_rank_figures(tmp_path / "new", RECORDS[:1], {}, SPECTRA)
    assert [path.name for path in files] == ["first_spectra.png"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
