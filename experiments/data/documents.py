"""Documents of text read from files: C4's JSON lines and plain text, either compressed.

Bytes become text exactly as they are (UTF-8, line ends kept), and whatever cannot be
read is an error that names the file and the place, never a document left out.
"""

import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from experiments.errors import UserError

_FORM_FEED = "\f"
_READ_BYTES = 1 << 20


def find_files(pattern: str) -> list[Path]:
    """Returns the files that a path or a glob names, sorted, at least one.

    Args:
        pattern: A file, or a glob such as ``c4/*.json.gz`` (``**`` crosses
            directories); ``~`` is the home directory.

    Raises:
        UserError: If no file matches, or the path is a directory.
    """
    expanded = os.path.expanduser(pattern)
    # Before globbing, because a file's own name may contain glob characters.
    if os.path.isfile(expanded):
        return [Path(expanded)]
    if os.path.isdir(expanded):
        raise UserError(
            f"{pattern} is a directory; name its files with a quoted glob such as "
            f"'{os.path.join(pattern, '*.json.gz')}'"
        )
    matches = sorted(glob.glob(expanded, recursive=True))
    files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:
        raise UserError(
            f"no file matches {pattern!r} from {os.getcwd()}; check the path, and put "
            "a glob in quotes"
        )
    return files


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of one file, in order; at least one, maybe empty ones.

    Args:
        path: One JSON object with a string ``text`` per line (``.json``, ``.jsonl``;
            C4's published layout), or plain text in which form feeds separate the
            documents (``.txt``; held in memory at once); ``.gz`` or ``.xz`` may follow.

    Raises:
        UserError: While reading, if the suffix is unknown, or the file is empty,
            unreadable, truncated or damaged, not UTF-8, or has a line that is not a
            JSON object with a string ``text``.
    """
    parse, opener = _format(path)
    try:
        if path.stat().st_size == 0:
            raise _empty(path)
        file = opener(path, "rb")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be opened ({reason}); check its permissions"
        ) from error
    found = False
    with file:
        try:
            for document in parse(path, file):
                found = True
                yield document
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{path} is truncated or damaged: reading stopped after "
                f"{file.tell():,} bytes of text ({error}); fetch or compress it again"
            ) from error
    if not found:
        raise _empty(path)


def _format(path):
    """Returns (parser, opener) by the suffixes of the path."""
    name = path.name.lower()
    for compression, opener in _OPENERS.items():
        for kind, parse in _PARSERS.items():
            if name.endswith(kind + compression):
                return parse, opener
    known = ", ".join(kind + end for kind in _PARSERS for end in _OPENERS)
    raise UserError(f"{path} has no known suffix; rename it to one of {known}")


def _json_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        # A blank line holds no document; editors leave them at the end of a file.
        if not line.isspace():
            yield _text_field(_decode(line, path, number), f"{path}, line {number}")


def _text_field(line, where):
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); write one JSON object per line, such as "
            '{"text": "..."}'
        ) from error
    text = example.get("text") if isinstance(example, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"{where}: no string 'text'; write one JSON object per line, such as "
            '{"text": "..."}'
        )
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer can encode.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: 'text' has a lone surrogate \\u{ord(text[error.start]):04x} at "
            f"character {error.start}, which is not UTF-8; repair that line"
        ) from error
    return text


def _plain_text(path: Path, file: BinaryIO) -> Iterator[str]:
    # In pieces, so that a truncated file's position is known.
    content = b"".join(iter(lambda: file.read(_READ_BYTES), b""))
    if content:
        yield from _decode(content, path, 1).split(_FORM_FEED)


def _decode(content, path, first_line):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: byte {column} of the line "
            f"(0x{content[error.start]:02x}) is not UTF-8; convert the file with iconv"
        ) from error


def _empty(path):
    return UserError(f"{path} is empty; leave it out or write text into it")


_PARSERS = {".json": _json_lines, ".jsonl": _json_lines, ".txt": _plain_text}
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
