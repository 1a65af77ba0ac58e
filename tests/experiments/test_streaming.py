import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data import streaming
from experiments.data.packing import Windows, join_documents
from experiments.data.streaming import ShardedDocuments, Stream, packed_batches
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError

datasets = pytest.importorskip(
    "datasets", reason="needs Hugging Face datasets: pip install lowrank_optax[c4]"
)
LENGTH = 16
# Lengths below, at and above a window, and empty documents.
DOCUMENTS = [f"{i:02d}" * (i * 7 % 23) for i in range(60)]
WITH_TEXT = [text for text in DOCUMENTS if text]


# At the top of the module, because datasets pickles what is not, with warnings.
def examples():
    yield from ({"text": text} for text in DOCUMENTS)


def no_examples():
    yield from ()


def empty_examples():
    yield from ({"text": text} for text in ("", None, " \n") * 20)


def example_without_text():
    yield {"txt": "a"}


@pytest.fixture(params=["generator", "json in 3 shards", "parquet in 3 shards"])
def dataset(request, tmp_path):
    if request.param == "generator":
        return datasets.IterableDataset.from_generator(examples)
    if request.param == "json in 3 shards":
        return json_dataset(tmp_path, DOCUMENTS, shards=3)
    return parquet_dataset(tmp_path, DOCUMENTS, shards=3)


def json_dataset(folder, documents, shards):
    names = []
    for shard in range(shards):
        names.append(str(folder / f"{shard}.json"))
        lines = [json.dumps({"text": text}) for text in documents[shard::shards]]
        Path(names[-1]).write_text("\n".join(lines))
    return datasets.load_dataset(
        "json", data_files=names, split="train", streaming=True
    )


def parquet_dataset(folder, documents, shards):
    names = []
    for shard in range(shards):
        names.append(str(folder / f"{shard}.parquet"))
        rows = pa.table({"text": documents[shard::shards]})
        parquet.write_table(rows, names[-1], row_group_size=7)
    return datasets.load_dataset(
        "parquet", data_files=names, split="train", streaming=True
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "_SHUFFLED_DOCUMENTS", 8)


def batches_of(dataset, seed=0, batch_size=2):
    batches = packed_batches(
        Stream("a test", dataset),
        ByteTokenizer(),
        batch_size=batch_size,
        sequence_length=LENGTH,
        seed=seed,
    )
    return iter(batches)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        for name in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(batch[name], other[name])


def documents_in(batches):
    """Returns the whole documents among the packed targets."""
    tokens = np.concatenate([batch["targets"].ravel() for batch in batches])
    ends = np.flatnonzero(tokens == 256)
    pieces = np.split(tokens, ends + 1)[:-1]
    return [ByteTokenizer().decode(piece.tolist()) for piece in pieces]


def test_every_document_comes_once_per_pass_in_another_order(dataset, monkeypatch):
    # A divisor of 57: a block may hold the end of one pass and the start of the next.
    assert (len(DOCUMENTS), len(WITH_TEXT)) == (60, 57)
    monkeypatch.setattr(streaming, "_SHUFFLED_DOCUMENTS", 19)
    iterator = batches_of(dataset)
    found = documents_in(take(iterator, 130))
    iterator.close()
    passes = [found[:57], found[57:114]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(WITH_TEXT)
    assert passes[0] != passes[1]
    assert WITH_TEXT not in passes


def test_packing_equals_that_of_local_text(dataset, small_blocks):
    iterator = batches_of(dataset, batch_size=1)
    streamed = take(iterator, 40)
    iterator.close()
    text = join_documents(documents_in(streamed), ByteTokenizer()).tokens
    # Streamed windows start with an end of document, local ones with the first token.
    local = Windows(np.concatenate([[256], text]), LENGTH)
    for index in range(len(local) - 1):
        for name, value in local[index].items():
            np.testing.assert_array_equal(streamed[index][name][0], value)


def test_batches_have_their_shapes_and_dtypes(dataset):
    iterator = batches_of(dataset)
    batch = next(iterator)
    iterator.close()
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "inputs": ((2, LENGTH), "int32"),
        "targets": ((2, LENGTH), "int32"),
        "weights": ((2, LENGTH), "float32"),
    }


def test_a_restored_state_continues_bit_for_bit_anywhere(dataset, small_blocks):
    """At 24 of 70 batches: mid-document, mid-block, across shards and passes."""
    iterator = batches_of(dataset)
    states, expected = [], []
    for _ in range(70):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    expected += take(iterator, 3)
    for position in range(0, 70, 3):
        iterator.set_state(json.loads(states[position]))
        assert json.dumps(iterator.get_state()) == states[position]
        assert_same(take(iterator, 3), expected[position : position + 3])
    iterator.close()


def test_states_in_the_middle_of_a_document_are_among_them(dataset, small_blocks):
    iterator = batches_of(dataset)
    offsets = [(next(iterator), iterator.get_state()["offset"])[1] for _ in range(70)]
    iterator.close()
    assert sum(offset > 0 for offset in offsets) > 35


def test_a_fresh_iterator_continues_the_state_of_another(tmp_path, small_blocks):
    source = json_dataset(tmp_path, DOCUMENTS, shards=3)
    iterator = batches_of(source)
    take(iterator, 33)
    state, expected = json.dumps(iterator.get_state()), take(iterator, 5)
    iterator.close()

    again = datasets.load_dataset(
        "json",
        data_files=sorted(map(str, tmp_path.glob("*.json"))),
        split="train",
        streaming=True,
    )
    fresh = batches_of(again)
    fresh.set_state(json.loads(state))
    assert_same(take(fresh, 5), expected)
    fresh.close()


def test_another_seed_gives_another_order(dataset, small_blocks):
    iterators = [batches_of(dataset, seed) for seed in (0, 0, 1)]
    found = [documents_in(take(iterator, 60)) for iterator in iterators]
    for iterator in iterators:
        iterator.close()
    assert found[0] == found[1] != found[2]


def test_the_shards_are_visited_in_another_order_each_pass(tmp_path):
    source = json_dataset(tmp_path, list("abcdefgh"), shards=8)
    found = take(iter(ShardedDocuments(Stream("a test", source), seed=0)), 24)
    passes = [found[i : i + 8] for i in (0, 8, 16)]
    assert [sorted(one) for one in passes] == [list("abcdefgh")] * 3
    assert len({tuple(one) for one in passes}) == 3


def test_the_state_stays_small(dataset, small_blocks):
    iterator = batches_of(dataset)
    take(iterator, 40)
    assert len(json.dumps(iterator.get_state())) < 1000
    iterator.close()


@pytest.mark.parametrize("generator", [no_examples, empty_examples])
def test_a_source_without_text_is_an_error(generator):
    empty = datasets.IterableDataset.from_generator(generator)
    with pytest.raises(UserError, match="a test has no text in column 'text'; name"):
        next(batches_of(empty))


def test_a_source_that_is_empty_for_long_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_EMPTY_IN_A_ROW", 50)
    empty = datasets.IterableDataset.from_generator(empty_examples)
    with pytest.raises(UserError, match="50 documents in a row are empty in column"):
        next(batches_of(empty))


def test_an_example_without_text_is_an_error():
    source = datasets.IterableDataset.from_generator(example_without_text)
    with pytest.raises(UserError, match="a test: there is no column 'text', but txt;"):
        next(batches_of(source))


def test_shards_that_are_held_out_are_not_trained_on(tmp_path):
    stream = Stream("a test", json_dataset(tmp_path, list("abcdefgh"), 8), held_out=1)
    found = take(iter(ShardedDocuments(stream, seed=0)), 14)
    assert [sorted(found[:7]), sorted(found[7:])] == [list("abcdefg")] * 2
    assert list(stream.texts(stream.shard(7))) == ["h"]


def test_the_c4_sample_streams_and_resumes(shared_data):
    path = shared_data / "c4" / "c4-train.00000-of-00001.json.gz"
    source = datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=True
    )
    iterator = packed_batches(
        Stream("the sample", source),
        ByteTokenizer(),
        batch_size=8,
        sequence_length=512,
        seed=0,
    ).__iter__()
    take(iterator, 1000)  # into the second block of documents
    state, expected = json.dumps(iterator.get_state()), take(iterator, 3)
    iterator.set_state(json.loads(state))
    assert_same(take(iterator, 3), expected)
    iterator.close()
