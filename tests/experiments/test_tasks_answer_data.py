import hashlib

import numpy as np
import pytest

from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError
from experiments.tasks.answer_data import (
    AnswerExamples,
    cut,
    first_answered,
    fit,
    make_answer_data,
)
from experiments.tasks.answers import Pair, Prompts
from experiments.tasks.rows import Place, Rows


def pair(prompt, answer):
    return Pair(np.array(prompt, np.int32), np.array(answer, np.int32))


def rows_of(name, texts):
    values = [{"prompt": prompt, "completion": answer} for prompt, answer in texts]
    places = [Place(name, "line", i + 1) for i in range(len(values))]
    return Rows(name, values, places, ())


def data_of(train, validation=(("a", "b"),), *, max_length=64, batch_size=2):
    return make_answer_data(
        Prompts("completion", ByteTokenizer()),
        rows_of("train.jsonl", train),
        {"validation": rows_of("other.jsonl", validation)},
        text_column="prompt",
        answer_column="completion",
        vocab_size=257,
        max_length=max_length,
        batch_size=batch_size,
        seed=0,
    )


def test_weights_are_one_where_a_token_of_the_answer_is_predicted():
    examples = AnswerExamples([pair([5, 6, 7], [8, 9]), pair([4], [3])])
    batch = examples.batch(np.array([0, 1, -1]), 6)

    assert examples.lengths.tolist() == [4, 1]
    assert batch["inputs"].tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 0, 0, 0, 0], [0] * 6]
    assert batch["targets"].tolist() == [
        [6, 7, 8, 9, 0, 0],
        [3, 0, 0, 0, 0, 0],
        [0] * 6,
    ]
    assert batch["weights"].tolist() == [
        [0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0] * 6,
    ]


@pytest.mark.parametrize(
    ("most", "length", "expected"),
    [(2, 3, "bd"), (1, 3, "b"), (9, 3, "bde"), (2, 99, "ab"), (2, 1, "ab")],
)
def test_the_first_rows_whose_answers_fit_are_answered(most, length, expected):
    """A long answer has five tokens, a short one two; none fits one token."""
    answers = {"a": "long", "b": "b", "c": "long", "d": "d", "e": "e"}
    rows = rows_of("v.jsonl", answers.items())
    prompts = Prompts("completion", ByteTokenizer())
    found = first_answered(prompts, rows, most, "prompt", "completion", length)
    assert "".join(found.column("prompt", "--text-column")) == expected
    assert found.name == "v.jsonl"


def test_a_problem_without_a_number_is_named_before_anything_is_trained():
    rows = rows_of("v.jsonl", [("a", "#### 1"), ("b", "two"), ("c", "three")])
    prompts = Prompts("gsm8k", ByteTokenizer())
    with pytest.raises(UserError, match=r"^v\.jsonl, line 2: .*'two' has no number"):
        first_answered(prompts, rows, 2, "prompt", "completion", 99)
    # What is not asked needs no answer.
    assert len(first_answered(prompts, rows, 1, "prompt", "completion", 99)) == 1


def test_a_batch_fits_the_longest_pair_exactly():
    batch = AnswerExamples([pair([5, 6], [8, 9])]).batch(np.array([0]), 3)

    assert batch["inputs"].tolist() == [[5, 6, 8]]
    assert batch["targets"].tolist() == [[6, 8, 9]]


@pytest.mark.parametrize(
    ("max_length", "prompt"),
    [(5, [1, 2, 3, 4]), (4, [2, 3, 4]), (2, [4]), (1, [4])],
)
def test_a_prompt_is_cut_on_the_left_down_to_its_last_token(max_length, prompt):
    assert cut(pair([1, 2, 3, 4], [7, 8]), max_length).prompt.tolist() == prompt


def test_a_pair_whose_answer_alone_is_too_long_is_left_out():
    pairs = [pair([1, 2], [3]), pair([1, 2], [3, 4]), pair([1, 2], [3, 4, 5])]
    kept, count = fit(pairs, 2)

    assert [[*map(np.ndarray.tolist, x)] for x in kept] == [
        [[1, 2], [3]],
        [[2], [3, 4]],
    ]
    assert count == 1


def test_the_description_counts_what_was_cut_and_left_out():
    texts = [("x", "y"), ("p" * 20, "y"), ("p" * 30, "yy"), ("x", "y" * 8)]
    data = data_of(texts, [("a", "b"), ("x", "y")], max_length=8)

    assert data.description.splitlines()[:2] == [
        "training: train.jsonl: 3 examples, 18 tokens, 6.0 on average, 8 at most; "
        "2 prompts cut on the left to fit 8 tokens; "
        "1 left out: the answer alone is longer",
        "validation: other.jsonl: 2 examples, 4 tokens, 2.0 on average, 2 at most; "
        "1 are in the training rows, too",
    ]


def test_every_answer_is_trained_on_once_an_epoch():
    texts = [("p" * i, "a" * (i % 7)) for i in range(25)]
    data = data_of(texts, batch_size=4)
    batches = data.train_iterator()

    for _ in range(2):
        epoch = [next(batches) for _ in range(data.steps_per_epoch)]
        places = np.concatenate([batch["index"] for batch in epoch])
        assert sorted(places[places >= 0]) == list(range(25))
        # Each answer and its end.
        wanted = sum(len(answer) + 1 for _, answer in texts)
        assert sum(batch["weights"].sum() for batch in epoch) == wanted
        assert {b["inputs"].shape[1] for b in epoch} <= set(data.bucket_lengths)
    batches.close()


def test_the_digest_tells_where_an_answer_begins():
    texts = [[("ab", "c")], [("a", "bc")], [("ab", "d")]]
    found = {data_of(text).digest for text in texts}

    assert len(found) == 3
    assert data_of(texts[0]).digest == data_of(texts[0]).digest
    assert len(AnswerExamples([]).digest()) == hashlib.sha256().digest_size


def test_an_answer_has_no_label():
    assert data_of([("a", "b")]).labels("validation").shape == (1, 0)


@pytest.mark.parametrize(
    ("texts", "max_length", "message"),
    [
        ([("a", "bbbb")], 4, "train.jsonl: every answer is longer than --max-length 4"),
        ([("a", "b")], 0, "--max-length is 0"),
    ],
)
def test_data_without_an_answer_that_fits_is_an_error(texts, max_length, message):
    with pytest.raises(UserError, match=message):
        data_of(texts, max_length=max_length)
