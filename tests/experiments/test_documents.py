import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.data import lines
from experiments.data.documents import read_documents
from experiments.errors import UserError
from tests.experiments.compression import COMPRESS, zstd

DOCUMENTS = ["One.\r\nTwo.", "", "žluťoučký \u2028 \U0001f40e\n", "\ufefflast"]
# 40 documents of text that does not compress to nothing, so that it can be cut.
LONG = [bytes.hex(np.random.default_rng(i).bytes(200)) for i in range(40)]


def as_json_lines(documents):
    return "".join(json.dumps({"text": d, "url": "u"}) + "\n" for d in documents)


def write(path, content, compression=""):
    path.write_bytes(COMPRESS[compression](content))
    return path


def error_of(path):
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON"])
def test_json_lines_come_back_exactly(tmp_path, suffix, compression):
    content = as_json_lines(DOCUMENTS).encode()
    path = write(tmp_path / f"a.b{suffix}{compression}", content, compression)
    assert list(read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_form_feeds_separate_the_documents_of_plain_text(tmp_path, compression):
    content = "\f".join(DOCUMENTS).encode()
    path = write(tmp_path / f"a.txt{compression}", content, compression)
    assert list(read_documents(path)) == DOCUMENTS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_text_survives_json_lines(tmp_path, documents):
    path = write(tmp_path / "a.jsonl", as_json_lines(documents).encode())
    assert list(read_documents(path)) == documents


def test_blank_lines_between_json_lines_hold_no_document(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\n{"text": "a"}\r\n\r\n{"text": ""}\n\n')
    assert list(read_documents(path)) == ["a", ""]


def test_the_c4_sample_has_its_documents(shared_data):
    path = shared_data / "c4" / "c4-train.00000-of-00001.json.gz"
    assert sum(1 for _ in read_documents(path)) == 3000


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.txt.xz", "a.jsonl.gz"])
def test_a_file_without_bytes_is_empty(tmp_path, name):
    assert "is empty" in error_of(write(tmp_path / name, b""))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", b""),
        ("a.txt.xz", b""),
        ("a.txt.zst", b""),
        ("a.json.gz", b"\n \n"),
        ("a.txt.gz", b"\xef\xbb\xbf"),
    ],
)
def test_a_compressed_file_without_text_is_empty(tmp_path, name, content):
    compression = Path(name).suffix
    assert "is empty" in error_of(write(tmp_path / name, content, compression))


@pytest.mark.parametrize(
    "name",
    ["a.txt.gz", "a.txt.xz", "a.json.gz", "a.jsonl.xz", "a.txt.zst", "a.jsonl.bz2"],
)
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_a_truncated_file_says_how_far_it_was_read(tmp_path, name, kept):
    text = "\f".join(LONG) if ".txt" in name else as_json_lines(LONG)
    path = write(tmp_path / name, text.encode(), Path(name).suffix)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    message = error_of(path)
    assert "truncated or damaged" in message
    assert "bytes of text" in message


def test_the_documents_before_a_truncation_are_read_first(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", as_json_lines(LONG).encode(), ".gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = []
    with pytest.raises(UserError, match=r"after [1-9][0-9,]* bytes"):
        read.extend(read_documents(path))  # keeps what came before the error
    assert read
    assert read == LONG[: len(read)]


@pytest.mark.parametrize(
    ("name", "content", "rename_to"),
    [
        ("a.json.gz", b"plain text, not compressed", "a.txt"),
        ("a.txt.xz", b'{"text": "a"}', "a.jsonl"),
        ("a.txt.gz", lzma.compress(b"text"), "a.txt.xz"),
        ("a.txt", gzip.compress(b"text"), "a.txt.gz"),
        ("a.jsonl", zstd.compress(b'{"text": "a"}'), "a.jsonl.zst"),
    ],
)
def test_renaming_is_advised_where_it_helps(tmp_path, name, content, rename_to):
    message = error_of(write(tmp_path / name, content))
    assert "is named" in message
    assert message.endswith(f"rename it to {rename_to}")
    renamed = write(tmp_path / rename_to, content)
    assert len(list(read_documents(renamed))) == 1


@pytest.mark.parametrize(
    ("name", "content", "holds"),
    [
        ("a.json.gz", b"PK\x03\x04" + bytes(40), "holds a zip archive"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3", "holds a PDF"),
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "holds text in UTF-16"),
        ("a.json", "\ufeff{}".encode("utf-16-be"), "holds text in UTF-16"),
        ("a.txt.gz", b"\xff\xd8\xff\0", "holds binary data"),
    ],
)
def test_what_renaming_does_not_help_is_said_to_be_what_it_is(
    tmp_path, name, content, holds
):
    message = error_of(write(tmp_path / name, content))
    assert holds in message
    assert "; convert it" in message
    assert "rename" not in message


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, compression):
    marked = ("\ufeff" + as_json_lines(DOCUMENTS)).encode()
    path = write(tmp_path / f"a.jsonl{compression}", marked, compression)
    assert list(read_documents(path)) == DOCUMENTS
    marked = ("\ufeff" + "\f".join(DOCUMENTS)).encode()
    path = write(tmp_path / f"a.txt{compression}", marked, compression)
    assert list(read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.json.gz", "a.txt.gz", "a.txt.xz"])
def test_a_flipped_bit_is_noticed_wherever_it_matters(tmp_path, name):
    text = "\f".join(LONG) if ".txt" in name else as_json_lines(LONG)
    path = write(tmp_path / name, text.encode(), Path(name).suffix)
    content, noticed = path.read_bytes(), 0
    positions = range(0, len(content), 97)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            documents = list(read_documents(path))
        except UserError:
            noticed += 1
        else:
            assert documents == LONG  # a bit of the header that carries no text
    assert noticed > 0.9 * len(positions)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"txt": "a", "n": 1}', "no column 'text', but txt, n; name the one with"),
        (b"{}", "no column 'text', but no column at all"),
        (b'{"text": 3}', "column 'text' holds int, not text; name another by --text"),
        (b'["text"]', "a JSON array, not an object; write one JSON object per line"),
        (b" [", "jq -c '.[]' FILE makes them of an array"),
        (b"3", "JSON, but not an object; write one JSON object per line"),
        (b'{"text": "a\\ud800b"}', r"lone surrogate \ud800 at character 1"),
        (b'{"text": "a\xff"}', "byte 12 of the line (0xff) is not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b"\n")
    message = error_of(path)
    assert complaint in message
    assert "line 2:" in message


def test_text_that_is_not_utf8_is_named_by_line_and_byte(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo é".encode())
    assert list(read_documents(path)) == ["one\ntwo é"]
    path.write_bytes("one\ntwo é".encode("latin-1"))
    assert "line 2: byte 5 of the line (0xe9) is not UTF-8" in error_of(path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    assert "cannot be opened (No such file" in error_of(tmp_path / "gone.txt")


def test_another_column_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": 1, "body": "a"}\n{"body": null}')
    assert list(read_documents(path, "body")) == ["a", ""]


def test_the_columns_are_listed_but_not_by_the_hundred(tmp_path):
    row = {f"column_{i}": i for i in range(500)}
    message = error_of(write(tmp_path / "a.json", json.dumps(row).encode()))
    assert "column_11 and 488 more" in message


def test_an_enormous_line_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST_LINE", 1 << 20)
    line = json.dumps({"text": "a" * (1 << 20)}).encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line)
    assert "line 2: longer than 1 MiB; write one JSON object per" in error_of(path)


def test_a_zstd_file_with_a_long_window_is_read(tmp_path):
    path = tmp_path / "a.txt.zst"
    options = {zstd.CompressionParameter.window_log: 31}
    with zstd.open(path, "wb", options=options) as file:
        file.write(b"text")
    with pytest.raises(zstd.ZstdError), zstd.open(path) as file:
        file.read()
    assert list(read_documents(path)) == ["text"]
