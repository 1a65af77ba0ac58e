"""Data sets of the hub, by folders that datasets reads as it reads those on the hub."""

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data import hub, sources
from experiments.data.hub import HubText, open_splits, parse_hub_text, texts
from experiments.data.pipeline import make_data
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError

datasets = pytest.importorskip(
    "datasets", reason="needs Hugging Face datasets: pip install lowrank_optax[c4]"
)
LENGTH = 16


# At the top of the module, because datasets pickles what is not, with warnings.
def lost_connection():
    yield {"text": "a"}
    raise ConnectionError("Server\nDisconnected")


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Returns a function that makes a data set; its name is a folder's."""
    monkeypatch.setattr(hub, "_ask_for", lambda name: None)

    def make(column="text", **splits):
        folder = tmp_path / "set"
        folder.mkdir()
        for name, files in splits.items():
            for number, documents in enumerate(files):
                path = folder / f"{name}-{number:05}-of-{len(files):05}.parquet"
                parquet.write_table(pa.table({column: documents}), path)
        return f"hub:{folder}"

    return make


def documents(start, stop=None):
    return [f"document {i}" for i in range(start, stop or start + 20)]


def data_of(spec, **options):
    return make_data(
        spec, ByteTokenizer(), batch_size=2, sequence_length=LENGTH, seed=0, **options
    )


def trained_on(data, batches):
    iterator = data.train_iterator()
    rows = [next(iterator)["targets"].ravel() for _ in range(batches)]
    iterator.close()
    return ByteTokenizer().decode([i if i < 256 else 10 for row in rows for i in row])


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("c4", HubText("allenai/c4", "en")),
        ("hub:a/b", HubText("a/b")),
        ("hub:a/b:en", HubText("a/b", "en")),
        ("hub:a/b::test", HubText("a/b", None, "test")),
        ("hub:a/b:en:test", HubText("a/b", "en", "test")),
        ("c4/*.json", None),
        ("embedded", None),
    ],
)
def test_a_specification_names_a_data_set_a_configuration_and_a_split(spec, text):
    assert parse_hub_text(spec) == text


@pytest.mark.parametrize("spec", ["hub:", "hub:a:b:c:d"])
def test_a_specification_with_too_little_or_too_much_is_an_error(spec):
    with pytest.raises(UserError, match="give hub:owner/name, hub:owner/name:conf"):
        parse_hub_text(spec)


def test_it_trains_on_the_train_split_and_validates_on_the_other(on_the_hub):
    spec = on_the_hub(train=[documents(0)], validation=[documents(50)])
    data = data_of(spec)
    assert data.train_tokens is None
    assert "streamed, empty documents left out" in data.description
    assert "its validation split: 240 tokens in 20 documents" in data.description
    assert data.validation_tokens == 240
    found = trained_on(data, 6)
    assert "document 1" in found
    assert "document 5\n" in found
    assert "document 50" not in found


def test_another_column_and_another_split_are_read(on_the_hub):
    spec = on_the_hub("body", train=[documents(0)], test=[documents(50)])
    other = {"validation_spec": f"{spec}::train", "text_column": "body"}
    data = data_of(f"{spec}::test", **other)
    assert "document 5" in trained_on(data, 6)
    assert f"the beginning of {spec[4:]} train: 230 tokens in" in data.description
    changed = data_of(f"{spec}::train", **{**other, "validation_spec": f"{spec}::test"})
    assert changed.token_digest != data.token_digest


def test_without_a_validation_split_the_last_file_is_held_out(on_the_hub):
    files = [documents(10), documents(30), documents(50)]
    data = data_of(on_the_hub(train=files))
    assert "the last of its 3 files, held out: 240 tokens in 20" in data.description
    found = trained_on(data, 40)
    assert "document 10" in found
    assert "document 49" in found
    assert "document 50" not in found


def test_without_a_validation_split_one_file_is_not_enough(on_the_hub):
    spec = on_the_hub(train=[documents(0)])
    with pytest.raises(UserError, match="neither a validation split nor a second file"):
        data_of(spec)


def test_the_same_split_is_not_trained_and_validated_on(on_the_hub):
    spec = on_the_hub(train=[documents(0)], validation=[documents(50)])
    with pytest.raises(UserError, match=r"train is in both the training and the valid"):
        data_of(spec, validation_spec=f"{spec}::train")


def test_files_can_be_validated_on_the_hub_and_the_hub_on_files(on_the_hub, tmp_path):
    spec = on_the_hub(train=[documents(0)], validation=[documents(50)])
    path = tmp_path / "other.txt"
    path.write_text("other text, a little longer than a window")
    assert data_of(spec, validation_spec=str(path)).validation_tokens == 42
    data = data_of(str(path), validation_spec=spec)
    assert (data.train_tokens, data.validation_tokens) == (42, 240)


def test_only_the_beginning_of_the_validation_split_is_read(on_the_hub, monkeypatch):
    monkeypatch.setattr(sources, "_STREAMED_VALIDATION_TOKENS", 100)
    spec = on_the_hub(train=[documents(0)], validation=[documents(50)])
    assert data_of(spec).validation_tokens == 100


def test_a_missing_split_or_column_lists_those_there_are(on_the_hub):
    spec = on_the_hub("body", train=[documents(0)], validation=[documents(50)])
    with pytest.raises(UserError, match="no split 'tset', but train, validation; name"):
        data_of(f"{spec}::tset", text_column="body")
    with pytest.raises(UserError, match="no column 'text', but body; name the one"):
        data_of(spec)


def test_an_unknown_configuration_is_one_line(on_the_hub):
    spec = on_the_hub(train=[documents(0)])
    with pytest.raises(UserError, match=r"'en' not found\. Available") as no:
        data_of(f"{spec}:en")
    assert "\n" not in str(no.value)


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch):
    class Unreachable:
        def dataset_info(self, name, timeout):
            assert timeout < 20
            raise ConnectionError(f"Couldn't\nreach {name}")

    def load(*args, **kwargs):
        raise AssertionError("it tries for minutes")

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"allenai/c4 cannot be read .*Couldn't reach a"
    ):
        data_of("c4")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install .* -e '.\[c4\]'"):
        open_splits(HubText("a/b"))


def test_a_connection_lost_on_the_way_is_one_line():
    source = datasets.IterableDataset.from_generator(lost_connection)
    with pytest.raises(UserError, match="ConnectionError: Server Disconnected"):
        list(texts(source, "text", "a test"))


def test_a_state_of_the_run_resumes_in_another_process(on_the_hub):
    spec = on_the_hub(train=[documents(0), documents(30), documents(60)])
    iterator = data_of(spec).train_iterator()
    for _ in range(13):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator)["targets"].tolist() for _ in range(9)]
    iterator.close()
    iterator = data_of(spec).train_iterator()
    iterator.set_state(json.loads(state))
    assert [next(iterator)["targets"].tolist() for _ in range(9)] == expected
    iterator.close()
