"""What a device sends: the formula against hand counts and compiled programs."""

import pytest

from benchmarks import bytes_moved
from benchmarks.bytes_moved import sent

# 4 layers of 6 x 10 in rank 2, columns kept; fsdp cuts the rows or the columns.
MATRIX = {"path": "blocks/up", "shape": [4, 6, 10], "rank": 2, "kept": [2]}


def one(leaf, **flags):
    return sent([leaf], 4, 2, **{"in_subspace": False, **flags})


def test_a_full_gradient_is_scattered_over_fsdp_and_its_shares_are_added_up():
    found = one(MATRIX | {"cut": 1})
    # Gathered forward and backward: a device lacks half of the 240.
    assert found.parameters == 2 * 120
    assert (found.bases, found.projected) == (0, 0)
    assert found.gradients == 120 + 2 * 120 * 3 / 4
    assert one(MATRIX | {"cut": 1}, scatters=False).gradients == 240 + 180


def test_a_gradient_in_a_subspace_has_one_number_per_kept_side_and_column():
    rows = one(MATRIX | {"cut": 1}, in_subspace=True)
    # The basis, 4 x 6 x 2, is cut; the coordinates, 4 x 10 x 2, are not.
    assert rows == (240, 24, 0, 2 * 80 * 7 / 8)
    columns = one(MATRIX | {"cut": 2}, in_subspace=True)
    assert columns == (240, 24, 0, 40 + 2 * 40 * 3 / 4)


def test_an_array_that_is_not_cut_is_added_up_over_all_devices():
    norm = {"path": "norm", "shape": [16], "rank": None, "kept": None, "cut": None}
    assert one(norm, in_subspace=True) == (0, 0, 2 * 16 * 7 / 8, 0)


def test_of_the_embedding_a_device_sends_its_share_of_the_gradient_alone():
    table = {**MATRIX, "path": "embedding", "rank": None, "cut": 1}
    assert one(table) == one(table, scatters=False) == (0, 0, 2 * 120 * 3 / 4, 0)
    assert one(table | {"cut": None}).gradients == 2 * 240 * 7 / 8


FILES = (bytes_moved.CHECKED, *bytes_moved.OTHERS)


@pytest.mark.parametrize("file", FILES)
def test_the_formula_is_what_the_compiled_steps_send(file):
    found = bytes_moved.measurements(file)
    for name, one in found["optimizers"].items():
        ours = sum(bytes_moved.of_mesh(found, name, scatters=False))
        program = one["programs"][bytes_moved.STEP]
        # Words that devices exchange for the lookup are not in the formula.
        theirs = bytes_moved.compiled(program, is_conditional=False)
        assert ours == pytest.approx(theirs, rel=0.01), name


@pytest.mark.parametrize("file", FILES)
def test_a_compiled_step_takes_the_planned_arguments(file):
    for name, one in bytes_moved.measurements(file)["optimizers"].items():
        for program in one["programs"].values():
            assert program["of_plan"] == pytest.approx(1, abs=0.02), name
