"""Documents of text read from files: JSON lines, plain text and Parquet.

Whatever cannot be read is an error that names the file and the place, never a document
left out.
"""

import functools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from experiments.data.columns import text_of
from experiments.data.files import Format, format_of
from experiments.data.lines import json_object, read_opened, text_lines, whole_text

_FORM_FEED = "\f"
_AN_OBJECT_PER_LINE = 'write one JSON object per line, such as {"text": "..."}'


def read_documents(path: Path, column: str = "text") -> Iterator[str]:
    """Yields the documents of one file, in order; at least one, maybe empty ones.

    Args:
        path: One JSON object per line (``.json``, ``.jsonl``; C4's published layout),
            or plain text in which form feeds separate the documents (``.txt``; held in
            memory at once); ``.gz``, ``.xz``, ``.bz2`` or ``.zst`` may follow. Or a
            table (``.parquet``).
        column: Of the objects or the table; a null in it is an empty document.

    Raises:
        UserError: While reading, if the suffix is unknown, or the file is empty,
            unreadable, truncated or damaged, not UTF-8, has a line that is not a JSON
            object or is longer than 256 MiB, or has no such column of text.
    """
    named = format_of(path)
    yield from read_opened(
        path, named, functools.partial(_parse, path, named, column=column)
    )


def _parse(path: Path, named: Format, file: BinaryIO, *, column: str) -> Iterator[str]:
    if named.kind == ".parquet":
        # A second's import that other files need not wait for.
        from experiments.data.parquet import parquet_texts

        return parquet_texts(path, file, column)
    if named.kind == ".txt":
        return _plain_text(path, named, file)
    return _json_lines(path, named, file, column)


def _json_lines(path, named, file, column):
    for number, line in text_lines(path, named, file, _AN_OBJECT_PER_LINE):
        # A blank line holds no document; editors leave them at the end of a file.
        if line.strip(string.whitespace):
            where = f"{path}, line {number}"
            yield text_of(json_object(line, where, _AN_OBJECT_PER_LINE), column, where)


def _plain_text(path, named, file):
    if text := whole_text(path, named, file):
        yield from text.split(_FORM_FEED)
