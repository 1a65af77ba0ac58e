import gzip
import json

import pytest

from experiments.errors import UserError
from experiments.tasks.exact_match import exact_match, last_number, marked_number


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("6 * 3 = 18\n#### 18", 18, 18),
        ("#### $1,234.50.", 1234.5, 1234.5),
        ("####-3", -3, -3),
        ("#### -$3.", -3, -3),
        ("#### 18.00", 18, 18),
        ("#### .5", 0.5, 0.5),
        ("#### 7 eggs, 2 of them broken", 7, 2),
        # Behind its answer a model may go on with problems of its own.
        ("#### 5\n\nNext: 2 + 2\n#### 4", 5, 4),
        ("It costs $1,200.", None, 1200),
        ("#### many", None, None),
        ("### 5", None, 5),
    ],
)
def test_a_number_is_read_as_a_number(text, marked, last):
    assert marked_number(text) == marked
    assert last_number(text) == last


def test_a_match_needs_the_mark_and_a_flexible_match_needs_the_last_number():
    solutions = ["2 + 2 = 4\n#### 4"] * 4
    texts = ["#### 4", "It is 4.", "#### 4 or 5", "nothing"]

    found = exact_match(texts, solutions)
    assert found == {"exact_match": 0.5, "flexible_match": 0.5}


def test_the_reference_is_behind_its_last_mark():
    found = exact_match(["#### 2000"], ["#### 1 is a mark\n#### 2,000"])

    assert found["exact_match"] == 1


def test_every_reference_of_gsm8k_has_its_number(shared_data):
    counts = {"train": 7473, "test": 1319}
    for split, count in counts.items():
        with gzip.open(shared_data / "gsm8k" / f"{split}.jsonl.gz", "rt") as file:
            solutions = [json.loads(line)["answer"] for line in file]

        assert len(solutions) == count
        # The mark's number is the last one of the solution, too.
        found = exact_match(solutions, solutions)
        assert found == {"exact_match": 1, "flexible_match": 1}


@pytest.mark.parametrize("solution", ["It is 4.", "It is 4.\n####", "#### x"])
def test_a_reference_without_a_number_is_an_error(solution):
    with pytest.raises(UserError, match="no number behind ####"):
        exact_match(["4"], [solution])


def test_no_problem_is_an_error():
    with pytest.raises(UserError, match="no problem to score"):
        exact_match([], [])
