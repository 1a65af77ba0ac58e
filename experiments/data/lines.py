"""The text of files, in lines or whole: what cannot be read is an error with its place.

Bytes become text exactly as they are (UTF-8, line ends kept; a mark of the byte order
at the beginning of a file is no text).
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from experiments.data.files import KINDS, READ_ERRORS, Format, not_as_named
from experiments.errors import UserError

_T = TypeVar("_T")
_READ_BYTES = 1 << 20
_LONGEST_LINE = 1 << 28


def read_opened(
    path: Path,
    named: Format,
    parse: Callable[[BinaryIO], Iterator[_T]],
    kinds: tuple[str, ...] = KINDS,
) -> Iterator[_T]:
    """Yields what a parser makes of a file's decompressed bytes; at least one thing.

    Args:
        path: Of the file.
        named: What its name says it is.
        parse: Reads on as it yields.
        kinds: That could be read, for errors.

    Raises:
        UserError: While reading, if the file is empty, unreadable, truncated or
            damaged.
    """
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
            for thing in parse(file):
                found = True
                yield thing
        except READ_ERRORS as error:
            is_unread = not found and not file.tell()
            mismatch = not_as_named(path, named, kinds) if is_unread else None
            raise mismatch or UserError(
                f"{path} is truncated or damaged: reading stopped after "
                f"{file.tell():,} bytes of text ({error}); fetch or compress it again"
            ) from error
    if not found:
        raise _empty(path)


def text_lines(
    path: Path,
    named: Format,
    file: BinaryIO,
    wanted: str,
    kinds: tuple[str, ...] = KINDS,
) -> Iterator[tuple[int, str]]:
    """Yields each line with its number, from 1, and its line end.

    Args:
        path: Of the file, for errors.
        named: As in :func:`read_opened`.
        file: Its bytes.
        wanted: What a line should hold, said of one that is longer than 256 MiB.
        kinds: As in :func:`read_opened`.
    """
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise UserError(
                f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; "
                f"{wanted}"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, _decode(line, path, named, number, kinds)


def whole_text(path: Path, named: Format, file: BinaryIO) -> str:
    """Returns the text of a file."""
    # In pieces, so that a truncated file's position is known.
    content = b"".join(iter(lambda: file.read(_READ_BYTES), b""))
    return _decode(content.removeprefix(codecs.BOM_UTF8), path, named, 1, KINDS)


def json_object(line: str, where: str, wanted: str) -> dict[str, Any]:
    """Returns the object that a line spells.

    Args:
        line: Of JSON.
        where: File and line, for errors.
        wanted: How to write one, for errors.

    Raises:
        UserError: If it spells none.
    """
    if line.lstrip().startswith("["):
        raise UserError(
            f"{where}: a JSON array, not an object; {wanted} "
            "(jq -c '.[]' FILE makes them of an array)"
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {wanted}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: JSON, but not an object; {wanted}")
    return row


def _decode(content, path, named, first_line, kinds):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise not_as_named(path, named, kinds) or UserError(
            f"{path}, line {line}: byte {column} of the line "
            f"(0x{content[error.start]:02x}) is not UTF-8; convert the file with iconv"
        ) from error


def _empty(path):
    return UserError(f"{path} is empty; leave it out or write text into it")
