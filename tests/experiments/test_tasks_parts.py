import pytest

from experiments.errors import UserError
from experiments.tasks import parts as parts_module
from experiments.tasks.parts import read_parts
from experiments.tasks.rows import Rows
from experiments.tasks.table import TASKS
from tests.experiments.small_tasks import write_rows

COLA = TASKS["cola"]


def table(tmp_path, count, name="train.jsonl"):
    return write_rows(tmp_path / name, [{"n": i} for i in range(count)])


def numbers(rows):
    return [row["n"] for row in rows.values]


def test_validation_rows_have_the_names_of_the_task_s_splits(tmp_path):
    train = table(tmp_path, 3)
    others = [table(tmp_path, n, f"{n}.jsonl") for n in (4, 5)]
    rows, parts = read_parts(TASKS["mnli"], train, others)
    assert len(rows) == 3
    assert {name: len(part) for name, part in parts.items()} == {
        "matched": 4,
        "mismatched": 5,
    }
    _, parts = read_parts(TASKS["mnli"], train, others[:1])
    assert list(parts) == ["matched"]
    with pytest.raises(UserError, match=r"2 validation texts .* has 1 \(validation\)"):
        read_parts(COLA, train, others)


def test_a_tenth_of_a_file_is_held_out_in_a_fixed_random_order(tmp_path):
    train, parts = read_parts(COLA, table(tmp_path, 95))
    held_out = numbers(parts["validation"])
    assert len(held_out) == 10
    assert sorted(numbers(train) + held_out) == list(range(95))
    # In the order of the file, and not its end.
    assert held_out == sorted(held_out) != list(range(85, 95))
    assert numbers(train) == sorted(numbers(train))
    assert parts["validation"].places[0].number == held_out[0] + 1
    assert parts["validation"].name == "10 rows of it, held out"
    again = read_parts(COLA, table(tmp_path, 95))[1]
    assert numbers(again["validation"]) == held_out


def test_at_most_1000_rows_are_held_out(tmp_path):
    train, parts = read_parts(COLA, table(tmp_path, 10_001))
    assert (len(train), len(parts["validation"])) == (9001, 1000)


def test_one_row_is_not_enough(tmp_path):
    with pytest.raises(UserError, match="has one row, but one to train on and one to"):
        read_parts(COLA, table(tmp_path, 1))


def test_no_file_is_in_two_parts(tmp_path):
    train = table(tmp_path, 3)
    with pytest.raises(UserError, match=r"train.jsonl is in two of the parts"):
        read_parts(COLA, train, [str(tmp_path / "*.jsonl")])


@pytest.mark.parametrize(
    ("task", "splits"),
    [
        ("cola", ["validation"]),
        ("mnli", ["validation_matched", "validation_mismatched"]),
    ],
)
def test_a_data_set_of_the_hub_has_its_own_splits(monkeypatch, task, splits):
    read = []

    def read_rows(spec, split="train"):
        read.append((spec, split))
        return Rows(spec, [{}], [], (spec,))

    monkeypatch.setattr(parts_module, "read_rows", read_rows)
    _, parts = read_parts(TASKS[task], "hub:nyu-mll/glue:x")
    assert tuple(parts) == TASKS[task].splits
    assert read == [
        ("hub:nyu-mll/glue:x", "train"),
        *((f"hub:nyu-mll/glue:x:{split}", split) for split in splits),
    ]
