import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import packing
from experiments.data.packing import Windows, join_documents, padded_batches
from experiments.data.tokenizers import ByteTokenizer

SIZES = {"count": st.integers(2, 200), "length": st.integers(1, 40)}


def targets_of(windows):
    return [int(t) for w in windows for t in w["targets"][w["weights"] == 1]]


def test_documents_are_joined_with_their_end():
    joined = join_documents(["ab", "é"], ByteTokenizer())
    assert joined.tokens.tolist() == [97, 98, 256, 0xC3, 0xA9, 256]
    assert str(joined) == "6 tokens in 2 documents"


def test_empty_documents_are_skipped_and_counted():
    joined = join_documents(["ab", "", " \n\u3000", "é"], ByteTokenizer())
    without = join_documents(["ab", "é"], ByteTokenizer())
    assert joined.tokens.tolist() == without.tokens.tolist()
    assert joined.ends.tolist() == without.ends.tolist()
    assert str(joined) == "6 tokens in 2 documents (2 empty, skipped)"
    assert len(join_documents([""] * 500, ByteTokenizer()).tokens) == 0


def test_bytes_are_counted_by_token():
    tokenizer = ByteTokenizer()
    joined = join_documents(["ab", "éé"], tokenizer)
    assert joined.ends.tolist() == [[0, 0], [3, 2], [8, 6]]
    assert joined.bytes_between(0, 8) == 6
    # The five tokens of the last document share its four bytes.
    assert joined.bytes_between(3, 8) == 4
    assert joined.bytes_between(7, 8) == pytest.approx(4 / 5)


def test_chunks_change_nothing(monkeypatch):
    texts = ["x" * n for n in (0, 3, 50, 7, 0, 1)]
    whole = join_documents(texts, ByteTokenizer()).tokens
    monkeypatch.setattr(packing, "_CHUNK_CHARACTERS", 5)
    np.testing.assert_array_equal(join_documents(texts, ByteTokenizer()).tokens, whole)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_tokens_take_the_smallest_dtype(vocabulary, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size, tokenizer.end_of_document = vocabulary, vocabulary - 1
    tokens = join_documents(["a"], tokenizer).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [97, vocabulary - 1]


def test_max_tokens_stops_reading(monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_CHARACTERS", 10)
    read = []
    documents = (read.append(i) or "x" * 6 for i in range(1000))
    joined = join_documents(documents, ByteTokenizer(), max_tokens=20)
    assert len(joined.tokens) == 20
    assert len(read) == 4


def test_progress_is_reported(monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_CHARACTERS", 1)
    monkeypatch.setattr(packing, "_REPORT_SECONDS", -1.0)
    lines = []
    join_documents(["ab", "c"], ByteTokenizer(), report=lines.append)
    assert lines == [
        "tokenized 1 documents, 3 tokens",
        "tokenized 2 documents, 5 tokens",
    ]


@given(**SIZES)
def test_every_token_but_the_first_is_a_target_once(count, length):
    windows = Windows(np.arange(100, 100 + count, dtype=np.uint16), length)
    seen = targets_of(windows[i] for i in range(len(windows)))
    assert seen == list(range(101, 100 + count))


@given(**SIZES)
def test_the_target_follows_its_input(count, length):
    windows = Windows(np.arange(100, 100 + count, dtype=np.uint16), length)
    for window in (windows[i] for i in range(len(windows))):
        assert {k: (v.shape, v.dtype.name) for k, v in window.items()} == {
            "inputs": ((length,), "int32"),
            "targets": ((length,), "int32"),
            "weights": ((length,), "float32"),
        }
        real = window["weights"] == 1
        np.testing.assert_array_equal(
            window["targets"][real], window["inputs"][real] + 1
        )


@settings(deadline=None)
@given(**SIZES, batch_size=st.integers(1, 9))
def test_all_validation_targets_come_once(count, length, batch_size):
    windows = Windows(np.arange(100, 100 + count, dtype=np.uint16), length)
    batches = list(padded_batches(windows, batch_size, count * 2))
    assert targets_of(batches) == list(range(101, 100 + count))
    assert {b["inputs"].shape for b in batches} == {(batch_size, length)}


@settings(deadline=None)
@given(**SIZES, batch_size=st.integers(1, 9), limit=st.integers(1, 250))
def test_a_limit_is_met_exactly_and_without_repeats(count, length, batch_size, limit):
    windows = Windows(np.arange(100, 100 + count, dtype=np.uint16), length)
    seen = targets_of(padded_batches(windows, batch_size, limit))
    assert len(seen) == len(set(seen)) == min(limit, count - 1)


def test_a_limit_still_sees_the_whole_text():
    windows = Windows(np.arange(1001, dtype=np.uint16), 10)
    seen = targets_of(padded_batches(windows, 4, 100))
    assert np.histogram(seen, bins=5, range=(0, 1000))[0].tolist() == [20] * 5
