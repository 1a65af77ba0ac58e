"""Documents of text read from files: JSON lines, plain text and Parquet.

Bytes become text exactly as they are (UTF-8, line ends kept; a mark of the byte order
at the beginning of a file is no text), and whatever cannot be read is an error that
names the file and the place, never a document left out.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from experiments.data.columns import text_of
from experiments.data.files import READ_ERRORS, Format, format_of, not_as_named
from experiments.errors import UserError

_FORM_FEED = "\f"
_READ_BYTES = 1 << 20
_LONGEST_LINE = 1 << 28
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
    try:
        if path.stat().st_size == 0:
            raise _empty(path)
        file = named.open(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be opened ({reason}); check its permissions"
        ) from error
    found = False
    with file:
        try:
            for document in _parse(path, named, file, column):
                found = True
                yield document
        except READ_ERRORS as error:
            mismatch = None if found or file.tell() else not_as_named(path, named)
            raise mismatch or UserError(
                f"{path} is truncated or damaged: reading stopped after "
                f"{file.tell():,} bytes of text ({error}); fetch or compress it again"
            ) from error
    if not found:
        raise _empty(path)


def _parse(path: Path, named: Format, file: BinaryIO, column: str) -> Iterator[str]:
    if named.kind == ".parquet":
        # A second's import that other files need not wait for.
        from experiments.data.parquet import parquet_texts

        return parquet_texts(path, file, column)
    if named.kind == ".txt":
        return _plain_text(path, named, file)
    return _json_lines(path, named, file, column)


def _json_lines(path, named, file, column):
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise UserError(
                f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; "
                f"{_AN_OBJECT_PER_LINE}"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        # A blank line holds no document; editors leave them at the end of a file.
        if line and not line.isspace():
            where = f"{path}, line {number}"
            yield text_of(
                _object(_decode(line, path, named, number), where), column, where
            )


def _object(line, where):
    if line.lstrip().startswith("["):
        raise UserError(
            f"{where}: a JSON array, not an object; {_AN_OBJECT_PER_LINE} "
            "(jq -c '.[]' FILE makes them of an array)"
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); {_AN_OBJECT_PER_LINE}"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: JSON, but not an object; {_AN_OBJECT_PER_LINE}")
    return row


def _plain_text(path, named, file):
    # In pieces, so that a truncated file's position is known.
    content = b"".join(iter(lambda: file.read(_READ_BYTES), b""))
    if content := content.removeprefix(codecs.BOM_UTF8):
        yield from _decode(content, path, named, 1).split(_FORM_FEED)


def _decode(content, path, named, first_line):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise not_as_named(path, named) or UserError(
            f"{path}, line {line}: byte {column} of the line "
            f"(0x{content[error.start]:02x}) is not UTF-8; convert the file with iconv"
        ) from error


def _empty(path):
    return UserError(f"{path} is empty; leave it out or write text into it")
