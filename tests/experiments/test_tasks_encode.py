"""Ids of transformers 5.24.0 are stored; `AutoTokenizer` gave them on these texts."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks.encode import (
    TextEncoder,
    integer_sequences,
    longest_sequence,
)
from experiments.tasks.rows import Place, Rows, read_rows
from tests.experiments.small_tasks import small_shape, write_tokenizer

MINILM = SimpleNamespace(
    vocab_size=30522, max_positions=512, type_vocab_size=2, padding_id=0
)


@pytest.fixture(scope="module")
def minilm(minilm_path):
    return TextEncoder(minilm_path, MINILM)


def listed(sequences):
    segments = np.split(sequences.segments, sequences.ends[:-1])
    return [(x.tolist(), s.tolist()) for x, s in zip(sequences, segments, strict=True)]


def test_minilm_encodes_a_pair_as_transformers(minilm):
    pair = [["Naïve café: don't!"], ["東京 \U0001f600 [SEP] x"]]
    ids = [101, 15743, 7668, 1024, 2123, 1005, 1056, 999, 102]
    second = [1879, 1755, 100, 102, 1060, 102]
    assert listed(minilm.encode(pair, 512)) == [
        (ids + second, [0] * len(ids) + [1] * len(second))
    ]


def test_minilm_encodes_a_sentence_as_transformers(minilm):
    text = "Our friends won't buy this analysis, let alone the next one we propose."
    ids = [2256, 2814, 2180, 1005, 1056, 4965, 2023, 4106, 1010, 2292, 2894, 1996, 2279]
    ids = [101, *ids, 2028, 2057, 16599, 1012, 102]
    assert listed(minilm.encode([[text]], 512)) == [(ids, [0] * 19)]


def test_minilm_cuts_the_longer_text_as_transformers(minilm):
    pair = [["a b c d e f g h i j"], ["k l m"]]
    ids = [101, 1037, 1038, 1039, 1040, 1041, 1042, 102, 1047, 1048, 1049, 102]
    sequences = minilm.encode(pair, 12)
    assert listed(sequences) == [(ids, [0] * 8 + [1] * 4)]
    assert sequences.cut == 1


@pytest.mark.parametrize(
    ("name", "columns", "most", "ids", "segments"),
    [
        ("cola", ["sentence"], 16, "7b88175a3d65dcf4", "1d2de40132d48ff0"),
        *[
            (
                "mrpc",
                ["sentence1", "sentence2"],
                48,
                "e8e5c481cb429ded",
                "6dbe1b55969a1658",
            )
        ],
    ],
)
def test_glue_has_the_ids_of_transformers(
    minilm, shared_data, name, columns, most, ids, segments
):
    rows = read_rows(str(shared_data / "glue" / f"{name}_validation.jsonl.gz"))
    sequences = minilm.encode(list(map(rows.texts, columns)), most)
    found = [
        hashlib.sha256(array.tobytes()).hexdigest()[:16]
        for array in (sequences.ids, sequences.segments)
    ]
    assert found == [ids, segments]


def test_bert_marks_the_second_text_and_cuts_from_the_longer(tmp_path):
    encoder = TextEncoder(write_tokenizer(tmp_path), small_shape())
    texts = [["a b", "a b c d e", ""], ["z", "y z", "z"]]
    sequences = encoder.encode(texts, 8)
    assert listed(sequences) == [
        ([2, 4, 5, 3, 29, 3], [0, 0, 0, 0, 1, 1]),
        ([2, 4, 5, 6, 3, 28, 29, 3], [0, 0, 0, 0, 0, 1, 1, 1]),
        ([2, 3, 29, 3], [0, 0, 1, 1]),
    ]
    assert sequences.cut == 1
    assert list(sequences.lengths) == [6, 8, 4]


def test_roberta_has_four_special_tokens_around_a_pair_and_no_segments(tmp_path):
    shape = small_shape(type_vocab_size=1)
    encoder = TextEncoder(write_tokenizer(tmp_path, "roberta"), shape)
    assert listed(encoder.encode([["a b"], ["z"]], 16)) == [
        ([2, 4, 5, 3, 3, 29, 3], [0] * 7)
    ]
    assert listed(encoder.encode([["a b"]], 16)) == [([2, 4, 5, 3], [0] * 4)]


def test_an_encoder_without_segments_has_none_of_its_tokenizer(tmp_path):
    encoder = TextEncoder(write_tokenizer(tmp_path), small_shape(type_vocab_size=1))
    assert listed(encoder.encode([["a"], ["z"]], 16)) == [([2, 4, 3, 29, 3], [0] * 5)]


def test_many_texts_are_encoded_in_blocks(tmp_path, monkeypatch):
    encoder = TextEncoder(write_tokenizer(tmp_path), small_shape())
    texts = ["a " * (i % 20) for i in range(25)]
    whole = encoder.encode([texts], 16)
    monkeypatch.setattr("experiments.tasks.encode._AT_ONCE", 4)
    blocks = encoder.encode([texts], 16)
    assert listed(blocks) == listed(whole)
    # Of 15 to 19 letters, with two special tokens.
    assert blocks.cut == whole.cut == 5


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    write_tokenizer(tmp_path, "none")
    with pytest.raises(
        UserError, match=r"tokenizer.json does not put an encoder's spe"
    ):
        TextEncoder(tmp_path, small_shape())


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer.json; save it there with"):
        TextEncoder(tmp_path, small_shape())


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"tokenizer.json is not a Hugging Face tokenize"
    ):
        TextEncoder(tmp_path, small_shape())


def test_a_tokenizer_of_another_encoder_is_refused(tmp_path):
    encoder = TextEncoder(write_tokenizer(tmp_path), small_shape(vocab_size=29))
    assert encoder.encode([["a y"]], 16).ids.max() == 28
    with pytest.raises(
        UserError, match=r"gives the id 29, but .* vocabulary is 0 to 28"
    ):
        encoder.encode([["a z"]], 16)


def test_the_longest_sequence_is_what_the_encoder_has_positions_for():
    assert longest_sequence(small_shape(), None, is_text=True) == 16
    assert longest_sequence(small_shape(max_positions=2048), None, is_text=True) == 512
    assert (
        longest_sequence(small_shape(max_positions=2048), None, is_text=False) == 2048
    )
    assert longest_sequence(small_shape(), 9, is_text=True) == 9
    with pytest.raises(
        UserError, match="--max-length 17: the encoder has 16 positions"
    ):
        longest_sequence(small_shape(), 17, is_text=True)
    with pytest.raises(UserError, match="--max-length 7: give at least 8"):
        longest_sequence(small_shape(), 7, is_text=True)


def cells(*values):
    places = [Place("cells.jsonl", "line", i + 1) for i in range(len(values))]
    return Rows("cells", [{"input_ids": value} for value in values], places, ())


def test_integers_are_ids_as_they_are():
    rows = cells([5, 29, 1], "7 8", "7, 8", list(range(20)))
    sequences = integer_sequences(rows, "input_ids", small_shape(), 16)
    found = [ids.tolist() for ids in sequences]
    assert found == [[5, 29, 1], [7, 8], [7, 8], list(range(16))]
    assert sequences.cut == 1
    assert not sequences.segments.any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 30], "has the id 30; the encoder's vocabulary is 0 to 29"),
        ([-1], "has the id -1; the encoder's vocabulary is 0 to 29"),
        ([], "has no id"),
        ("", "has no id"),
        ("a b", "holds text, not a sequence of integers"),
        (3, "holds an integer, not a sequence of integers"),
        ([1.0], "holds a list, not a sequence of integers"),
        (None, "holds null, not a sequence of integers"),
    ],
)
def test_what_is_no_sequence_of_ids_names_the_row(value, message):
    with pytest.raises(UserError) as caught:
        integer_sequences(cells([1], value), "input_ids", small_shape(), 16)
    text = str(caught.value)
    assert text.startswith("cells.jsonl, line 2: column 'input_ids' ")
    assert message in text
