import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks.encode import EncodedExamples, Sequences
from experiments.tasks.task_data import make_task_data

BATCH = 8


def examples(count, seed):
    """Sequences of 3 to 60 tokens, each of its own number."""
    lengths = np.random.default_rng(seed).integers(3, 61, count)
    ids = np.repeat(np.arange(count, dtype=np.int32), lengths)
    segments = np.zeros(len(ids), np.int8)
    sequences = Sequences(ids, segments, np.cumsum(lengths), cut=0)
    return EncodedExamples(sequences, np.arange(count, dtype=np.int32) % 3, 99)


def data_of(count=43, seed=0, train=None, batch_size=BATCH):
    return make_task_data(
        train or examples(count, 0),
        {"matched": examples(21, 1), "mismatched": examples(5, 2)},
        description="words",
        label_names=("a", "b", "c"),
        batch_size=batch_size,
        seed=seed,
    )


def take(data, batches):
    iterator = data.train_iterator()
    taken = [next(iterator) for _ in range(batches)]
    iterator.close()
    return taken


def places(batches):
    return [int(i) for batch in batches for i in batch["index"] if i >= 0]


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name])
            assert value.dtype == other[name].dtype


def test_every_epoch_has_each_example_once_in_a_new_order():
    data = data_of()
    assert (data.train_examples, data.steps_per_epoch) == (43, 6)
    batches = take(data, 18)
    epochs = [places(batches[i : i + 6]) for i in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(43))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    # The last batch alone is filled up.
    assert [int(b["weights"].sum()) for b in batches[:6]] == [8, 8, 8, 8, 8, 3]
    assert list(batches[5]["index"][3:]) == [-1] * 5


def test_another_seed_gives_another_order_in_every_epoch():
    orders = [places(take(data_of(seed=seed), 6)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert places(take(data_of(seed=0), 12)[6:]) != orders[2]


def test_an_iterator_resumes_in_the_middle_of_an_epoch():
    data = data_of()
    expected = take(data, 15)
    iterator = data.train_iterator()
    for _ in range(8):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = data_of().train_iterator()
    next(resumed)
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(7)], expected[8:])
    resumed.close()


def test_no_draw_comes_twice():
    draws = np.concatenate([batch["draw"] for batch in take(data_of(), 30)])
    assert draws.dtype == np.uint32
    assert len(np.unique(draws)) == len(draws) == 30 * BATCH


def test_a_batch_has_the_tokens_labels_and_mask_of_its_examples():
    data = data_of()
    lengths = data.train.lengths
    for batch in take(data, 6):
        length = batch["tokens"].shape[1]
        real = batch["index"] >= 0
        longest = lengths[batch["index"][real]].max()
        assert length == min(b for b in data.bucket_lengths if b >= longest)
        for row, place in enumerate(batch["index"]):
            count = lengths[place] if real[row] else 0
            assert list(batch["tokens"][row, :count]) == [place] * count
            assert set(batch["tokens"][row, count:]) <= {99}
            # Padding has one token, so that no softmax is empty.
            assert batch["mask"][row].sum() == max(count, 1)
            assert batch["mask"][row, : max(count, 1)].all()
        np.testing.assert_array_equal(
            batch["labels"][real], data.train.labels[batch["index"][real]]
        )
        np.testing.assert_array_equal(batch["weights"], real.astype(np.float32))
        shapes = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
        assert shapes == {
            "tokens": ((BATCH, length), "int32"),
            "mask": ((BATCH, length), "float32"),
            "segments": ((BATCH, length), "int32"),
            "labels": ((BATCH,), "int32"),
            "weights": ((BATCH,), "float32"),
            "index": ((BATCH,), "int32"),
            "draw": ((BATCH,), "uint32"),
        }


def test_validation_has_each_example_once_in_order_of_length():
    data = data_of()
    assert data.splits == ("matched", "mismatched")
    for split, count in {"matched": 21, "mismatched": 5}.items():
        batches = list(data.batches(split))
        assert sorted(places(batches)) == list(range(count))
        lengths = data.validation[split].lengths[places(batches)]
        assert list(lengths) == sorted(lengths)
        found = data.labels(split)[places(batches)]
        weights = np.concatenate([b["weights"] for b in batches]) > 0
        labels = np.concatenate([b["labels"] for b in batches])
        np.testing.assert_array_equal(labels[weights], found)
    assert_same(data.batches("matched"), data_of(seed=5).batches("matched"))


def test_there_are_no_more_shapes_than_the_description_says():
    # Batches of few examples differ in length.
    data = data_of(count=400, batch_size=2)
    batches = take(data, 100) + [b for name in data.splits for b in data.batches(name)]
    shapes = {batch["tokens"].shape for batch in batches}
    assert {length for _, length in shapes} <= set(data.bucket_lengths)
    assert len(data.bucket_lengths) > 1
    listed = ", ".join(map(str, data.bucket_lengths))
    assert f"padded to {listed} tokens" in data.description
    times = f"are each compiled at most {len(data.bucket_lengths)} times"
    assert times in data.description


def test_a_batch_may_be_larger_than_the_data():
    data = data_of(count=3)
    batches = take(data, 4)
    assert data.steps_per_epoch == 1
    assert [sorted(places([b])) for b in batches] == [[0, 1, 2]] * 4


def changed(**changes):
    """A set in which one id, one segment, one end or one label is another."""
    ends = np.array([3, 6])
    parts = {"ids": np.arange(6, dtype=np.int32), "segments": np.zeros(6, np.int8)}
    parts |= {"ends": ends, "labels": np.array([0, 1], np.int32)}
    parts |= {name: np.array(x, parts[name].dtype) for name, x in changes.items()}
    labels = parts.pop("labels")
    return EncodedExamples(Sequences(**parts, cut=0), labels, padding_id=0)


def test_the_digest_tells_ids_segments_ends_and_labels_apart():
    sets = [
        changed(),
        changed(ids=[0, 1, 2, 3, 4, 9]),
        changed(segments=[0, 0, 0, 0, 0, 1]),
        changed(ends=[2, 6]),
        changed(labels=[1, 1]),
    ]
    digests = [data_of(train=one).digest for one in sets]
    assert len(set(digests)) == 5
    assert data_of(train=changed()).digest == digests[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1, got 0"),
        ({"seed": -1}, "the seed must be at least 0 and below"),
        ({"seed": 2**32}, "the seed must be at least 0 and below"),
    ],
)
def test_numbers_out_of_range_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        data_of(**options)


def test_examples_of_another_kind_have_batches_too():
    def batch(index, length):
        return {"inputs": np.zeros((len(index), length), np.int32)}

    other = SimpleNamespace(
        lengths=np.array([4, 9]),
        labels=np.zeros((2, 0)),
        batch=batch,
        digest=lambda: b"",
    )
    (first,) = take(data_of(train=other, batch_size=2), 1)
    assert set(first) == {"inputs", "index", "draw"}
    assert first["inputs"].shape == (2, 16)
