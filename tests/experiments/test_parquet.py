"""Parquet files: their texts, and what is said of those that have none."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data.documents import read_documents
from experiments.data.parquet import parquet_rows
from experiments.errors import UserError

DOCUMENTS = ["One.\r\nTwo.", "", "žluťoučký \u2028 \U0001f40e\n", "\ufefflast"]


def write(path, columns, **options):
    parquet.write_table(pa.table(columns), path, **options)
    return path


def error_of(path, column="text"):
    with pytest.raises(UserError) as caught:
        list(read_documents(path, column))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_texts_come_back_exactly_over_all_row_groups(tmp_path, kind, compression):
    column = pa.array([*DOCUMENTS, None], pa.string()).cast(kind)
    path = write(
        tmp_path / "a.parquet",
        {"url": ["u"] * 5, "text": column},
        row_group_size=2,
        compression=compression,
    )
    assert list(read_documents(path)) == [*DOCUMENTS, ""]


def test_another_column_is_read(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": [1], "body": ["a"]})
    assert list(read_documents(path, "body")) == ["a"]


def test_a_missing_column_lists_those_there_are(tmp_path):
    path = write(tmp_path / "a.parquet", {"id": [1], "content": ["a"]})
    message = error_of(path)
    assert "no column 'text', but id, content; name the one" in message
    assert message.endswith("by --text-column")


def test_a_column_that_holds_no_text_says_what_it_holds(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": [[1]], "raw": [b"a"]})
    assert "column 'text' holds list<element: int64>, not text" in error_of(path)
    assert "column 'raw' holds binary, not text" in error_of(path, "raw")


def test_a_table_without_rows_is_empty(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert "is empty" in error_of(path)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_file_says_so(tmp_path, kept):
    path = write(tmp_path / "a.parquet", {"text": DOCUMENTS * 99})
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "is truncated, damaged or not Parquet" in error_of(path)


def test_damage_in_the_middle_says_how_far_it_was_read(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(200).hex() for _ in range(4000)]
    path = write(
        tmp_path / "a.parquet", {"text": texts}, row_group_size=2000, compression="gzip"
    )
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 4
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    assert "reading stopped after 1,024 rows" in error_of(path)


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    raw = pa.array([b"a", b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    path = write(tmp_path / "a.parquet", {"text": text})
    assert "column 'text' is not UTF-8" in error_of(path)


def test_two_columns_of_a_name_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, path)
    assert "two columns are called 'text'" in error_of(path)


def test_a_value_that_python_has_not_is_an_error(tmp_path):
    path = tmp_path / "t.parquet"
    times = pa.array([10**15], pa.timestamp("ms"))
    parquet.write_table(pa.table({"text": ["a"], "when": times}), path)
    message = "none that Python has .*leave out its column"
    with pytest.raises(UserError, match=message), path.open("rb") as file:
        list(parquet_rows(path, file))
