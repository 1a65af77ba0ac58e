import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.data.documents import find_files, read_documents
from experiments.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
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


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON"])
def test_json_lines_come_back_exactly(tmp_path, suffix, compression):
    content = as_json_lines(DOCUMENTS).encode()
    path = write(tmp_path / f"a.b{suffix}{compression}", content, compression)
    assert list(read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
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
    ("name", "content"), [("a.txt.gz", b""), ("a.txt.xz", b""), ("a.json.gz", b"\n \n")]
)
def test_a_compressed_file_without_text_is_empty(tmp_path, name, content):
    compression = Path(name).suffix
    assert "is empty" in error_of(write(tmp_path / name, content, compression))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.json.gz", "a.jsonl.xz"])
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


@pytest.mark.parametrize("name", ["a.json.gz", "a.txt.xz", "a.txt.gz"])
def test_a_file_that_is_not_what_its_suffix_says_is_damaged(tmp_path, name):
    path = write(tmp_path / name, b"plain text, not compressed")
    assert "truncated or damaged" in error_of(path)


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
        (b"[" * 100_000, "not JSON"),
        (b'{"txt": "a"}', "no string 'text'"),
        (b'{"text": null}', "no string 'text'"),
        (b'["text"]', "no string 'text'"),
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


@pytest.mark.parametrize("name", ["a.csv", "a.txt.zip", "a", "txt"])
def test_an_unknown_suffix_lists_the_known_ones(tmp_path, name):
    message = error_of(write(tmp_path / name, b"text"))
    for suffix in (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".txt", ".txt.xz"):
        assert suffix in message


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    assert "cannot be opened (No such file" in error_of(tmp_path / "gone.txt")


def test_a_glob_finds_files_sorted_and_in_subdirectories(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("b.txt", "a.txt", "d/c.txt", "x.json"):
        write(tmp_path / name, b"text")
    names = [p.name for p in find_files(str(tmp_path / "**" / "*.txt"))]
    assert names == ["a.txt", "b.txt", "c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    path = write(tmp_path / "a[1].txt", b"text")
    write(tmp_path / "a1.txt", b"text")
    assert find_files(str(path)) == [path]


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.txt", b"text")
    assert find_files("~/*.txt") == [path]


def test_no_match_names_the_pattern(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*none\.txt'"):
        find_files(str(tmp_path / "none.txt"))


def test_a_directory_suggests_a_glob(tmp_path):
    with pytest.raises(UserError, match="is a directory; name its files"):
        find_files(str(tmp_path))
