import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import pipeline, sources, streaming
from experiments.data.packing import Windows, join_documents
from experiments.data.pipeline import make_data
from experiments.data.streaming import ShardedDocuments, load_c4, packed_batches, texts
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError

datasets = pytest.importorskip(
    "datasets", reason="needs Hugging Face datasets: pip install lowrank_optax[c4]"
)
LENGTH = 16
# Lengths below, at and above a window, and empty documents.
DOCUMENTS = [f"{i:02d}" * (i * 7 % 23) for i in range(60)]


# At the top of the module, because datasets pickles what is not, with warnings.
def examples():
    yield from ({"text": text} for text in DOCUMENTS)


def no_examples():
    yield from ()


def example_without_text():
    yield {"txt": "a"}


def example_with_null():
    yield {"text": None}


def lost_connection():
    yield {"text": "a"}
    raise ConnectionError("Server\nDisconnected")


@pytest.fixture(params=["generator", "json in 3 shards"])
def dataset(request, tmp_path):
    if request.param == "generator":
        return datasets.IterableDataset.from_generator(examples)
    return json_dataset(tmp_path, DOCUMENTS, shards=3)


def json_dataset(folder, documents, shards):
    names = []
    for shard in range(shards):
        names.append(str(folder / f"{shard}.json"))
        lines = [json.dumps({"text": text}) for text in documents[shard::shards]]
        Path(names[-1]).write_text("\n".join(lines))
    return datasets.load_dataset(
        "json", data_files=names, split="train", streaming=True
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "_SHUFFLED_DOCUMENTS", 8)


def batches_of(dataset, seed=0, batch_size=2):
    batches = packed_batches(
        dataset,
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
    # A divisor of 60: a block may hold the end of one pass and the start of the next.
    monkeypatch.setattr(streaming, "_SHUFFLED_DOCUMENTS", 12)
    iterator = batches_of(dataset)
    found = documents_in(take(iterator, 130))
    iterator.close()
    passes = [found[:60], found[60:120]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(DOCUMENTS)
    assert passes[0] != passes[1]
    assert DOCUMENTS not in passes


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
    found = take(iter(ShardedDocuments(source, seed=0)), 24)
    passes = [found[i : i + 8] for i in (0, 8, 16)]
    assert [sorted(one) for one in passes] == [list("abcdefgh")] * 3
    assert len({tuple(one) for one in passes}) == 3


def test_the_state_stays_small(dataset, small_blocks):
    iterator = batches_of(dataset)
    take(iterator, 40)
    assert len(json.dumps(iterator.get_state())) < 1000
    iterator.close()


def test_a_source_without_documents_is_an_error():
    empty = datasets.IterableDataset.from_generator(no_examples)
    with pytest.raises(UserError, match="no document"):
        next(batches_of(empty))


@pytest.mark.parametrize("generator", [example_without_text, example_with_null])
def test_an_example_without_text_is_an_error(generator):
    source = datasets.IterableDataset.from_generator(generator)
    with pytest.raises(UserError, match="no string 'text'"):
        next(batches_of(source))


def test_a_connection_lost_on_the_way_is_one_line():
    source = datasets.IterableDataset.from_generator(lost_connection)
    with pytest.raises(UserError, match="ConnectionError: Server Disconnected"):
        list(texts(source))


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install .* -e '.\[c4\]'"):
        load_c4("train")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"hub cannot be reached.*Couldn't reach"):
        load_c4("train")


@pytest.fixture
def local_c4(monkeypatch, tmp_path):
    """Puts 60 documents in the place of both splits of C4."""
    opened = []

    def load(split):
        opened.append(split)
        return json_dataset(tmp_path, DOCUMENTS, shards=1)

    monkeypatch.setattr(sources, "load_c4", load)
    monkeypatch.setattr(pipeline, "load_c4", load)
    return opened


def make_c4(**kwargs):
    return make_data(
        "c4", ByteTokenizer(), batch_size=2, sequence_length=LENGTH, seed=0, **kwargs
    )


def test_c4_trains_on_its_train_split_and_validates_on_the_other(local_c4):
    data = make_c4()
    assert sorted(local_c4) == ["train", "validation"]
    assert data.train_tokens is None
    assert data.validation_tokens == len("".join(DOCUMENTS)) + 60
    assert "allenai/c4 en, streamed" in data.description
    iterator = data.train_iterator()
    assert next(iterator)["inputs"].shape == (2, LENGTH)
    iterator.close()


def test_only_the_beginning_of_the_validation_split_is_read(local_c4, monkeypatch):
    monkeypatch.setattr(sources, "_STREAMED_VALIDATION_TOKENS", 100)
    assert make_c4().validation_tokens == 100


def test_c4_can_be_validated_on_files(local_c4, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("other text")
    data = make_c4(validation_spec=str(path))
    assert local_c4 == ["train"]
    assert data.validation_tokens == 11


def test_the_c4_sample_streams_and_resumes(shared_data):
    path = shared_data / "c4" / "c4-train.00000-of-00001.json.gz"
    source = datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=True
    )
    iterator = packed_batches(
        source, ByteTokenizer(), batch_size=8, sequence_length=512, seed=0
    ).__iter__()
    take(iterator, 1000)  # into the second block of documents
    state, expected = json.dumps(iterator.get_state()), take(iterator, 3)
    iterator.set_state(json.loads(state))
    assert_same(take(iterator, 3), expected)
    iterator.close()
