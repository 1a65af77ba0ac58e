import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data import hub
from experiments.errors import UserError
from experiments.tasks.rows import read_rows
from tests.experiments.compression import COMPRESS

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "ž\u2028d", "label": "y"}]
TABLES = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": "\n".join(json.dumps(row) for row in ROWS),
    ".csv": 'text,label\r\n"a ""b"", c",x\r\nž\u2028d,y\r\n',
    ".tsv": 'text\tlabel\na "b", c\tx\nž\u2028d\ty',
}


def error_of(read, *arguments):
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def error_in(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(read_rows, str(path))
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_has_the_same_rows(tmp_path, kind, compression):
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](("\ufeff" + TABLES[kind]).encode()))
    rows = read_rows(str(path))
    assert rows.values == ROWS
    assert rows.name == str(path)
    assert rows.origins == (path,)
    first = 2 if kind in (".csv", ".tsv") else 1
    assert [str(place) for place in rows.places] == [
        f"{path}, line {first}",
        f"{path}, line {first + 1}",
    ]


def test_parquet_has_rows_of_any_type(tmp_path):
    ids = [[1, 2], [3]]
    table = pa.table({"input_ids": ids, "label": [0, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert rows.column("input_ids", "") == ids
    assert str(rows.places[1]) == f"{tmp_path / 'a.parquet'}, row 2"


def test_a_row_of_csv_is_where_it_begins(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",x\n\nlast,y\n')
    rows = read_rows(str(path))
    assert rows.column("text", "") == ["two\nlines", "last"]
    # The blank line holds no row.
    assert [place.number for place in rows.places] == [2, 5]


def test_a_folder_has_the_rows_of_its_tables_in_order(tmp_path):
    (tmp_path / "b.tsv").write_text("text\nsecond\n")
    (tmp_path / "a.csv").write_text("text\nfirst\n")
    (tmp_path / "readme.txt").write_text("no table")
    rows = read_rows(str(tmp_path))
    assert rows.texts("text") == ["first", "second"]
    assert "2 files, a.csv to b.tsv; 1 of another kind left out" in rows.name
    assert read_rows(str(tmp_path / "*.?sv")).values == rows.values


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{', ", line 2: not JSON"),
        ("a.jsonl", b"\n[1]", ", line 2: a JSON array, not an object"),
        ("a.json", b"1", ", line 1: JSON, but not an object"),
        ("a.csv", b"a,b\n1,2\n1\n", ", line 3: 1 cell, but line 1 names 2 columns"),
        ("a.tsv", b"a\n1\t2\n", ", line 2: 2 cells, but line 1 names 1 column;"),
        ("a.csv", b'a\nb\n"c', ", line 3: not CSV"),
        ("a.csv", b'a\n"b"c\n', ", line 2: not CSV"),
        ("a.tsv", b"a\tb\ta\n", ", line 1: two columns are named 'a'"),
        ("a.csv", b"a\nb\n\xff\n", ", line 3: byte 1 of the line (0xff) is not UTF-8"),
        ("a.csv", b"a,b\n", " has no row behind the names of its columns; add some"),
        ("a.tsv", b"\n\n", " is empty"),
        ("a.jsonl", b"\n \n", " is empty"),
        ("a.tsv.gz", gzip.compress(b"a\nb\n" * 99)[:-9], " is truncated or damaged"),
        ("a.csv", gzip.compress(b"a\nb\n"), " is named .csv, but holds"),
        ("a.txt", b"text", " has no known suffix, but holds plain text; convert it to"),
        ("a.parquet", b"text", " is truncated, damaged or not Parquet"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, name, content, message):
    assert error_in(tmp_path, name, content).startswith(message)


def test_a_file_without_a_suffix_is_renamed_to_a_table(tmp_path):
    assert error_in(tmp_path, "a.gz", gzip.compress(b'{"a": 1}')).endswith(
        "rename it to a.jsonl.gz"
    )


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1", "b": 2}\n{"b": 3}\n')
    rows = read_rows(str(path))
    assert error_of(rows.texts, "text") == (
        f"{path}, line 1: there is no column 'text', but a, b; name the right one by "
        "--text-columns"
    )
    assert error_of(rows.column, "a", "--x").startswith(
        f"{path}, line 2: there is no column 'a', but b; name the right one by --x"
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [("1", "an integer"), ("null", "null"), ("true", "a boolean"), ("[]", "a list")],
)
def test_a_text_of_another_type_names_the_row(tmp_path, value, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": ""}}\n{{"text": {value}}}\n')
    message = error_of(read_rows(str(path)).texts, "text")
    assert message.startswith(f"{path}, line 2: column 'text' holds {kind}, not text;")


def test_half_a_character_names_the_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d"}\n')
    message = error_of(read_rows(str(path)).texts, "text")
    assert message.startswith(f"{path}, line 1: 'text' has a lone surrogate \\ud83d")


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """The name of a data set, which is a folder's."""
    pytest.importorskip(
        "datasets", reason="needs Hugging Face datasets: pip install lowrank_optax[c4]"
    )
    monkeypatch.setattr(hub, "_ask_for", lambda name: None)
    for split, labels in {"train": [0, 1], "validation": [1]}.items():
        table = pa.table({"text": ["a"] * len(labels), "label": labels})
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    return f"hub:{tmp_path}"


def test_a_data_set_of_the_hub_has_rows_by_split(on_the_hub):
    train = read_rows(on_the_hub)
    assert train.values == [{"text": "a", "label": 0}, {"text": "a", "label": 1}]
    assert len(read_rows(on_the_hub, "validation")) == 1
    assert len(read_rows(f"{on_the_hub}::validation")) == 1
    folder = on_the_hub.removeprefix("hub:")
    assert str(train.places[1]) == f"{folder} train, row 2"
    assert f"{folder} has no split 'test', but train, validation; name one" in error_of(
        read_rows, f"{on_the_hub}::test"
    )


def test_glue_has_its_rows(shared_data):
    rows = read_rows(str(shared_data / "glue" / "cola_train.jsonl.gz"))
    assert len(rows) == 8551
    assert Path(rows.places[-1].source).name == "cola_train.jsonl.gz"
    assert rows.places[-1].number == 8551
