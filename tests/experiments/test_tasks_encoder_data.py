from types import SimpleNamespace

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks.encoder_data import make_encoder_data
from experiments.tasks.labels import read_labels
from experiments.tasks.parts import read_parts
from experiments.tasks.table import TASKS
from tests.experiments.small_tasks import small_shape, write_rows, write_tokenizer

PAIRS = [
    {"sentence1": "a b", "sentence2": "c", "label": 0},
    {"sentence1": "d", "sentence2": "e f g h i j k l m n o p q r", "label": 1},
    {"sentence1": "g", "sentence2": "h", "label": 1},
]


def make(tmp_path, task, train, validation=None, **options):
    write_tokenizer(tmp_path)
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("train", train), ("validation", validation or train[:1]))
    ]
    defaults = {"directory": tmp_path, "shape": small_shape(), "batch_size": 2}
    kind = TASKS[task]
    rows, parts = read_parts(kind, paths[0], paths[1:])
    return make_encoder_data(kind, rows, parts, seed=0, **(defaults | options))


def test_a_pair_becomes_one_sequence(tmp_path):
    data = make(tmp_path, "mrpc", PAIRS)
    assert data.label_names == ("not_equivalent", "equivalent")
    (batch,) = data.batches("validation")
    assert batch["tokens"][0].tolist() == [2, 4, 5, 3, 6, 3, 0, 0]
    assert batch["segments"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert batch["mask"][0].tolist() == [1] * 6 + [0] * 2
    assert batch["index"].tolist() == [0, -1]
    assert batch["weights"].tolist() == [1, 0]
    assert data.bucket_lengths == (8, 16)


def test_no_batch_is_longer_than_the_positions(tmp_path):
    data = make(tmp_path, "mrpc", PAIRS, shape=small_shape(max_positions=15))
    assert data.train.lengths.max() == 15
    assert data.bucket_lengths == (8, 15)


def test_the_description_counts_what_is_trained_and_validated_on(tmp_path):
    data = make(tmp_path, "mrpc", PAIRS)
    train, validation, batches = data.description.split("\n")
    assert train == (
        f"training: {tmp_path / 'train.jsonl'}: 3 examples, 27 tokens, 9.0 on average, "
        "16 at most (1 of them cut there: longer than 16); equivalent 66.7 %, "
        "not_equivalent 33.3 %"
    )
    assert validation.endswith(
        "100.0 %, equivalent 0.0 %; 1 are in the training rows, too"
    )
    assert batches.startswith("batches: padded to 8, 16 tokens")


def test_columns_have_names_of_the_users_own(tmp_path):
    rows = [{"a": "x", "b": "y", "score": 0.5}, {"a": "z", "b": "y", "score": 1}]
    data = make(
        tmp_path, "regression", rows, text_columns=("a", "b"), label_column="score"
    )
    assert data.label_names == ()
    assert data.train.labels.tolist() == [0.5, 1]
    assert data.train.lengths.tolist() == [5, 5]
    assert "labels 0.5 to 1" in data.description
    with pytest.raises(
        UserError, match=r"line 1: there is no column 'c', but a, b, sc"
    ):
        make(tmp_path, "regression", rows, text_columns=("c",), label_column="score")
    with pytest.raises(
        UserError, match="has 3 columns, but the task reads one text or"
    ):
        make(tmp_path, "regression", rows, text_columns=("a", "b", "c"))


def test_integers_need_no_tokenizer(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "label": "b"}, {"input_ids": [8], "label": "a"}]
    data = make(tmp_path, "tokens", rows, directory=tmp_path / "none")
    (batch,) = data.batches("validation")
    assert batch["tokens"][0].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert data.label_names == ("a", "b")
    with pytest.raises(
        UserError, match="has 2 columns, but the task reads one sequence"
    ):
        make(tmp_path, "tokens", rows, text_columns=("input_ids", "label"))


def test_many_classes_are_listed_in_part(tmp_path):
    rows = [{"text": "a", "label": i} for i in range(11)]
    data = make(tmp_path, "classification", rows)
    assert "7 9.1 %, and 3 more" in data.description


@pytest.fixture(scope="module")
def minilm(minilm_path):
    shape = {"vocab_size": 30522, "max_positions": 512, "type_vocab_size": 2}
    return {"directory": minilm_path, "shape": SimpleNamespace(padding_id=0, **shape)}


# Examples and the share of class 1, or the mean, of the published splits.
@pytest.mark.parametrize(
    ("task", "train", "validation", "label"),
    [
        ("cola", 8551, 1043, 0.7044),
        ("mrpc", 3668, 408, 0.6745),
        ("rte", 2490, 277, 0.4984),
        ("stsb", 5749, 1500, 2.7010),
    ],
)
def test_glue_has_its_examples_and_labels(shared_data, task, train, validation, label):
    rows, parts = glue(shared_data, task)
    _, labels, others = read_labels(TASKS[task], rows, parts, "label")
    assert (len(labels), len(others["validation"])) == (train, validation)
    assert np.mean(labels) == pytest.approx(label, abs=1e-4)


def test_minilm_is_trained_on_mrpc(minilm, shared_data):
    rows, parts = glue(shared_data, "mrpc")
    options = {**minilm, "batch_size": 32, "seed": 0}
    data = make_encoder_data(TASKS["mrpc"], rows, parts, **options)
    assert data.steps_per_epoch == 115
    assert data.train.lengths.max() == 103
    assert data.bucket_lengths == (80, 104)
    # The same rows give the same run on every machine.
    assert data.digest == "dab28a3da292cb3a"


def glue(shared_data, task):
    train, validation = (
        str(shared_data / "glue" / f"{task}_{part}.jsonl.gz")
        for part in ("train", "validation")
    )
    return read_parts(TASKS[task], train, [validation])
