import dataclasses

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks.labels import read_labels
from experiments.tasks.rows import Place, Rows
from experiments.tasks.table import TASKS


def rows_of(labels, name="train.csv"):
    places = [Place(name, "line", i + 2) for i in range(len(labels))]
    return Rows(name, [{"label": label} for label in labels], places, ())


def read(task, train, validation=()):
    validation = rows_of(validation or train, "validation.csv")
    return read_labels(TASKS[task], rows_of(train), {"validation": validation}, "label")


def error_of(task, train, validation=()):
    with pytest.raises(UserError) as caught:
        read(task, train, validation)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "names", "labels"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        # CSV spells integers as text.
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),
        ([True, False], ("false", "true"), [1, 0]),
        # pandas makes numbers of integers beside a gap.
        ([1.0, 0.0], ("0", "1"), [1, 0]),
    ],
)
def test_classes_are_those_of_the_training_rows(train, names, labels):
    found, numbers, parts = read("classification", train, train[:1])
    assert found == names
    assert list(numbers) == labels
    assert list(parts["validation"]) == labels[:1]
    assert numbers.dtype == np.int32


def test_a_class_has_one_number_however_a_file_spells_it():
    _, _, parts = read("classification", [0, 1], ["1", "0"])
    assert list(parts["validation"]) == [1, 0]


@pytest.mark.parametrize("labels", [[1, 0], ["1", "0"], ["acceptable", "unacceptable"]])
def test_a_class_of_glue_is_given_by_number_or_name(labels):
    names, numbers, _ = read("cola", labels)
    assert names == ("unacceptable", "acceptable")
    assert list(numbers) == [1, 0]


@pytest.mark.parametrize("labels", [[0, 2.5, 5.0], ["0", "2.5", "5"]])
def test_numbers_are_float32(labels):
    names, numbers, parts = read("stsb", labels)
    assert names == ()
    assert numbers.dtype == parts["validation"].dtype == np.float32
    assert list(numbers) == [0, 2.5, 5]


@pytest.mark.parametrize(
    ("task", "train", "validation", "message"),
    [
        ("cola", [0, 2], [], "train.csv, line 3: the label 2 is none of the task's: 0"),
        ("cola", [0, 1], ["good"], "validation.csv, line 2: the label 'good' is none"),
        ("cola", [0, 1], [1, -1], "validation.csv, line 3: the label is -1: GLUE's te"),
        ("rte", [0, None], [], "train.csv, line 3: there is no label"),
        ("classification", ["a", ""], [], "train.csv, line 3: there is no label"),
        (
            "classification",
            ["a", "b"],
            ["c"],
            "validation.csv, line 2: the label 'c' is none of those of the training "
            "rows: a, b; repair that row, or name another column by --label-column",
        ),
        (
            "classification",
            ["a", 1],
            [],
            "train.csv, line 3: the label 1 is an integer",
        ),
        ("classification", [1, 0.5], [], "line 3: the label 0.5 is a number, not a cl"),
        ("classification", [[1], [2]], [], "line 2: the label is a list, not text or"),
        ("classification", ["a", "a"], [], "all training rows have the label 'a'; gi"),
        ("stsb", [1, 5.1], [], "train.csv, line 3: the label 5.1 is outside 0 to 5;"),
        ("stsb", [1], [-1.0], "outside 0 to 5; GLUE's test rows have no label;"),
        ("stsb", ["one"], [], "train.csv, line 2: the label 'one' is no finite number"),
        ("regression", [1e5, float("nan")], [], "line 3: the label nan is no finite"),
        ("regression", [True], [], "line 2: the label True is no finite number"),
        ("regression", [1, None], [], "line 3: there is no label"),
    ],
)
def test_what_is_no_label_names_row_and_label(task, train, validation, message):
    assert message in error_of(task, train, validation)


@pytest.mark.parametrize("number", [1e39, -1e39, 10**400])
def test_a_number_that_float32_has_not_is_no_label(number):
    assert "is no finite number in float32" in error_of("regression", [0.5, number], [])


def test_classes_of_equal_numbers_have_an_order():
    names, _, _ = read("classification", ["1", "01", "2", "001"], ["1"])
    assert names == ("001", "01", "1", "2")
    digits = "9" * 5000
    assert read("classification", [digits, "2"], ["2"])[0] == ("2", digits)


def test_a_column_that_is_not_there_names_those_that_are():
    rows = rows_of([0, 1])
    with pytest.raises(
        UserError, match=r"line 2: there is no column 'gold', but label"
    ):
        read_labels(TASKS["cola"], rows, {}, "gold")
    other = dataclasses.replace(rows_of([0], "v.csv"), values=[{"x": 0}])
    with pytest.raises(UserError, match=r"v.csv, line 2: there is no column 'label'"):
        read_labels(TASKS["cola"], rows, {"validation": other}, "label")


def test_a_class_of_which_all_rows_are_held_out_is_a_class():
    whole = rows_of(["a", "rare", "b", "a"])
    whole = dataclasses.replace(whole, origins=("train.csv",))
    train, held_out = whole.take([0, 2, 3], "train.csv"), whole.take([1], "held out")
    names, labels, others = read_labels(
        TASKS["classification"], train, {"validation": held_out}, "label"
    )
    assert names == ("a", "b", "rare")
    assert (list(labels), list(others["validation"])) == ([0, 1, 0], [2])
