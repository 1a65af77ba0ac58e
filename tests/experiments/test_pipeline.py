import dataclasses
import gzip
import json

import numpy as np
import pytest

from experiments.data.pipeline import make_data
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError

LENGTH = 16


def random_text(size, seed=0):
    """Text whose windows of 16 bytes are all different."""
    letters = np.random.default_rng(seed).integers(97, 123, size, np.uint8)
    return letters.tobytes().decode()


@pytest.fixture
def files(tmp_path):
    """A training file of 41 windows, the last with one target, and one to validate."""
    (tmp_path / "train.txt").write_text(random_text(LENGTH * 40 + 1))
    (tmp_path / "validation.txt").write_text(random_text(200, seed=1))
    return tmp_path


def data_of(files, *, batch_size=3, seed=0, validation="validation.txt", **kwargs):
    return make_data(
        str(files / "train.txt"),
        ByteTokenizer(),
        batch_size=batch_size,
        sequence_length=LENGTH,
        seed=seed,
        validation_spec=None if validation is None else str(files / validation),
        **kwargs,
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def windows_of(batches):
    return [tuple(row) for batch in batches for row in batch["inputs"].tolist()]


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        for name in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches_have_their_shapes_and_dtypes(files):
    batch = next(data_of(files).train_iterator())
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "inputs": ((3, LENGTH), "int32"),
        "targets": ((3, LENGTH), "int32"),
        "weights": ((3, LENGTH), "float32"),
    }


def test_every_window_comes_once_per_epoch_and_every_epoch_has_its_order(files):
    windows = windows_of(take(data_of(files).train_iterator(), 41))
    epochs = [windows[i : i + 41] for i in (0, 41, 82)]
    assert len(set(epochs[0])) == 41
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_every_token_but_the_first_is_a_target_once_per_epoch(files):
    data = data_of(files)
    targets = np.zeros(257)
    for batch in take(data_of(files, batch_size=41).train_iterator(), 1):
        np.add.at(targets, batch["targets"], batch["weights"])
    expected = ByteTokenizer().encode((files / "train.txt").read_text()[1:])
    assert data.train_tokens == targets.sum() + 1
    np.testing.assert_array_equal(targets[:256], np.bincount(expected, minlength=256))
    assert targets[256] == 1


def test_the_same_seed_gives_the_same_batches(files):
    first, second = (take(data_of(files).train_iterator(), 30) for _ in range(2))
    assert_same(first, second)


def test_neighbouring_seeds_are_unrelated(files):
    first = windows_of(take(data_of(files, batch_size=41).train_iterator(), 2))
    second = windows_of(take(data_of(files, batch_size=41, seed=1).train_iterator(), 2))
    # Grain adds the epoch to a plain seed: epoch 1 of seed 0 = epoch 0 of seed 1.
    assert first[41:] != second[:41]
    assert first[:41] != second[:41]


@pytest.mark.parametrize("position", [0, 1, 13, 14, 40])
def test_a_restored_state_continues_bit_for_bit(files, position):
    iterator = data_of(files).train_iterator()
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 20)

    fresh = data_of(files).train_iterator()
    take(fresh, 5)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 20), expected)


def test_the_state_is_that_of_the_batch_returned_not_of_the_prefetched(files):
    iterator = data_of(files).train_iterator()
    take(iterator, 2)
    state = iterator.get_state()
    take(iterator, 4)
    iterator.set_state(state)
    assert_same(take(iterator, 4), take(data_of(files).train_iterator(), 6)[2:])


def test_validation_is_the_same_for_every_call_and_seed(files):
    data = data_of(files)
    expected = list(data.validation_batches())
    take(data.train_iterator(), 3)
    assert_same(data.validation_batches(), expected)
    assert_same(data_of(files, seed=7).validation_batches(), expected)


def test_validation_covers_its_text_once(files):
    data = data_of(files)
    targets = [
        token
        for batch in data.validation_batches()
        for token in batch["targets"][batch["weights"] == 1].tolist()
    ]
    text = (files / "validation.txt").read_text()
    assert targets == [*text[1:].encode(), 256]
    assert data.validation_tokens == len(text) + 1
    assert sum(b["weights"].sum() for b in data.validation_batches(50)) == 50


def test_the_end_of_the_text_is_held_out_without_a_validation_text(files):
    (files / "train.txt").write_text(random_text(9999))
    data = data_of(files, validation=None)
    assert (data.train_tokens, data.validation_tokens) == (9500, 500)
    assert "the last 500 of them, held out" in data.description
    first = next(data.validation_batches())["inputs"][0]
    assert bytes(first.tolist()).decode() == random_text(9999)[9500:9516]


def test_bytes_per_token_are_those_of_the_validation_text(files):
    # One token of the 200 and one is the end of the document.
    assert data_of(files).bytes_per_token == pytest.approx(200 / 201)
    (files / "train.txt").write_text("x" * 9_000 + "\fa" * 400)
    assert data_of(files, validation=None).bytes_per_token == 0.5


def test_epochs_count_windows(files):
    data = data_of(files, batch_size=4)
    assert data.epochs(41) == 4
    assert dataclasses.replace(data, train_tokens=None).epochs(41) is None


def test_at_least_a_window_is_held_out(files):
    (files / "train.txt").write_text(random_text(50))
    data = data_of(files, validation=None)
    assert (data.train_tokens, data.validation_tokens) == (51 - 17, 17)


def test_at_most_half_a_million_tokens_are_held_out(files):
    (files / "train.txt").write_text("x" * 10_000_100)
    assert data_of(files, validation=None).validation_tokens == 500_000


def test_the_description_counts_documents_and_empty_ones(files):
    (files / "train.txt").write_text("a\f\f" + random_text(100))
    said = data_of(files).description
    assert "103 tokens in 2 documents (1 empty, skipped)" in said


def test_a_glob_reads_all_its_files(files):
    (files / "more.jsonl").write_text(json.dumps({"text": random_text(99)}))
    data = make_data(
        str(files / "*n.txt"),
        ByteTokenizer(),
        batch_size=1,
        sequence_length=4,
        seed=0,
        validation_spec=str(files / "*.jsonl"),
    )
    assert data.train_tokens == 641 + 1 + 200 + 1
    assert "(2 files)" in data.description


def test_one_other_letter_changes_the_digest(files):
    digests = [data_of(files).token_digest for _ in range(2)]
    for name in ("train.txt", "validation.txt"):
        text = (files / name).read_text()
        (files / name).write_text(text[:-1] + "A")
        digests.append(data_of(files).token_digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_less_than_two_windows_say_how_many_tokens_are_needed(files):
    (files / "train.txt").write_text("x" * 32)
    with pytest.raises(UserError, match=r"train.txt has 33 tokens.* take 34;"):
        data_of(files, validation=None)


def test_less_than_one_training_window_says_so(files):
    (files / "train.txt").write_text("x" * 15)
    with pytest.raises(UserError, match=r"train.txt has 16 tokens, but 17 are needed"):
        data_of(files)


@pytest.mark.parametrize("name", ["train.txt", "validation.txt"])
def test_documents_that_are_all_empty_are_no_text(files, name):
    (files / name).write_text("\f" * 499)
    with pytest.raises(UserError, match=rf"{name} has no text: 500 documents, all of"):
        data_of(files)


def test_validating_on_the_training_file_is_an_error(files):
    with pytest.raises(UserError, match=r"train.txt is in both the training"):
        data_of(files, validation="*.txt")


def test_validating_on_a_copy_of_the_training_text_is_an_error(files):
    text = (files / "train.txt").read_text()
    (files / "train.txt").write_text(f"{text}\fanother document")
    (files / "copy.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"text": text}).encode())
    )
    with pytest.raises(UserError, match=r"every document of the validation text, .*co"):
        data_of(files, validation="copy.jsonl.gz")


def test_validation_documents_that_are_trained_on_are_counted(files):
    (files / "train.txt").write_text("\f".join(["a", "", "a", "b", random_text(99)]))
    (files / "validation.txt").write_text("\f".join(["a", "b", "", "c"]))
    said = data_of(files).description
    assert "in 3 documents (1 empty, skipped); 2 of them are in the training" in said


def test_another_column_is_trained_on(files):
    (files / "train.jsonl").write_text(json.dumps({"text": "", "body": "x" * 99}))
    options = {"batch_size": 1, "sequence_length": 4, "seed": 0}
    data = make_data(
        str(files / "train.jsonl"), ByteTokenizer(), text_column="body", **options
    )
    assert data.train_tokens + data.validation_tokens == 100
    with pytest.raises(UserError, match=r"--text-column body: .*train.txt has no col"):
        make_data(
            str(files / "train.txt"), ByteTokenizer(), text_column="body", **options
        )


def test_a_folder_is_read_and_said(files):
    (files / "notes.md").write_text("not read")
    data = make_data(
        str(files), ByteTokenizer(), batch_size=1, sequence_length=4, seed=0
    )
    assert data.train_tokens + data.validation_tokens == 641 + 1 + 200 + 1
    named = "(2 files, train.txt to validation.txt; 1 of another kind left out)"
    assert f"training: {files} {named}: 843 tokens" in data.description


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1, got 0"),
        ({"seed": -1}, "the seed must be at least 0"),
        ({"seed": 2**32}, "the seed must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_an_error(files, wrong, message):
    with pytest.raises(UserError, match=message):
        data_of(files, **wrong)


def test_a_validation_limit_below_one_is_an_error(files):
    with pytest.raises(UserError, match="at least 1 token, got 0"):
        data_of(files).validation_batches(0)


def test_the_embedded_text_needs_no_file():
    data = make_data(
        "embedded", ByteTokenizer(), batch_size=2, sequence_length=64, seed=0
    )
    assert data.train_tokens > 5e6
    assert data.validation_tokens > 2e5
    assert next(data.train_iterator())["weights"].sum() == 128


def test_the_c4_sample_trains_on_one_file_and_validates_on_the_other(shared_data):
    folder = shared_data / "c4"
    data = make_data(
        str(folder / "c4-train.*.json.gz"),
        ByteTokenizer(),
        batch_size=2,
        sequence_length=64,
        seed=0,
        validation_spec=str(folder / "c4-validation.*.json.gz"),
    )
    assert "3,000 documents" in data.description
    assert "200 documents" in data.description
