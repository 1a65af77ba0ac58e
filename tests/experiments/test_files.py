"""Which files --data finds, and what is said of those that it cannot read."""

import gzip
import io
import tarfile

import pytest

from experiments.data.files import find_files
from experiments.errors import UserError


def write(path, content=b"text"):
    path.write_bytes(content)
    return path


def error_of(pattern):
    with pytest.raises(UserError) as caught:
        find_files(str(pattern))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_glob_finds_files_sorted_and_in_subdirectories(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("b.txt", "a.txt", "d/c.txt", "x.json"):
        write(tmp_path / name)
    names = [p.name for p in find_files(str(tmp_path / "**" / "*.txt")).paths]
    assert names == ["a.txt", "b.txt", "c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    path = write(tmp_path / "a[1].txt")
    write(tmp_path / "a1.txt")
    assert find_files(str(path)).paths == [path]


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.txt")
    assert find_files("~/*.txt").paths == [path]


def test_no_match_names_the_pattern(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*none\.txt'"):
        find_files(str(tmp_path / "none.txt"))


def test_a_folder_is_its_files_that_can_be_read(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl.zst", "README.md", ".hidden.txt", "sub/c.txt"):
        write(tmp_path / name)
    found = find_files(str(tmp_path))
    assert [path.name for path in found.paths] == ["a.jsonl.zst", "b.txt"]
    said = "(2 files, a.jsonl.zst to b.txt; 1 of another kind left out)"
    assert found.name == f"{tmp_path} {said}"

    for name in ("README.md", "a.jsonl.zst"):
        (tmp_path / name).unlink()
    assert find_files(str(tmp_path)).name == f"{tmp_path} (1 file, b.txt)"


def test_a_folder_without_text_says_how_to_read_its_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/a.txt")
    write(tmp_path / "a.png")
    message = error_of(tmp_path)
    assert f"the folder {tmp_path} has no file that can be read (.jsonl" in message
    assert f"'{tmp_path}/**/*.parquet'" in message


def tar(name, content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a", b"text", "plain text; rename it to a.txt"),
        ("a.md", "né".encode(), "plain text; rename it to a.txt"),
        ("a.txt.old", b"text", "plain text; rename it to a.txt"),
        ("a.b.c", b' {"text": "a"}', "JSON; rename it to a.b.jsonl"),
        ("a.gz", gzip.compress(b"text"), "plain text in .gz; rename it to a.txt.gz"),
        ("a.jsonl.gzip", gzip.compress(b"{}"), "JSON in .gz; rename it to a.jsonl.gz"),
        ("a.parq", b"PAR1" + bytes(9), "Parquet; rename it to a.parquet"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "Parquet in .gz; convert it"),
        ("a.csv", b"text,n\na,1\n", "a table in text; convert it to .jsonl"),
        ("a.zip", b"PK\x03\x04", "a zip archive; convert it to .jsonl"),
        ("a.tar", tar("a.txt", b"text"), "a tar archive; convert it"),
        ("a.tgz", gzip.compress(tar("a", b"t")), "a tar archive in .gz; convert it"),
        ("a.arrow", b"ARROW1\0\0", "Arrow; convert it to .jsonl"),
        ("a.bin", bytes(range(64)), "binary data; convert it to .jsonl"),
        ("a.old", "é".encode("latin-1"), "text that is not UTF-8; convert it to UTF-8"),
        ("a.win", "a".encode("utf-16"), "text in UTF-16; convert it to UTF-8"),
        ("a.gz", gzip.compress(b"text" * 99)[:20], "damaged .gz data"),
    ],
)
def test_an_unknown_suffix_says_what_the_content_is(tmp_path, name, content, advice):
    path = write(tmp_path / name, content)
    message = error_of(path)
    assert message.startswith(f"{path} has no known suffix, but holds")
    assert advice in message
    # Of a glob's files each is looked at before the first is read.
    write(tmp_path / "0.txt")
    assert message == error_of(tmp_path / "*")


def test_what_is_longer_than_a_look_may_end_within_a_character(tmp_path):
    path = write(tmp_path / "a.md", "é".encode() * 4096)
    assert "rename it to a.txt" in error_of(path)
    path = write(tmp_path / "a.md", b"a" + "é".encode() * 4096)
    assert "rename it to a.txt" in error_of(path)
