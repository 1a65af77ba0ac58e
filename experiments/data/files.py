"""The files that a flag names, and what their names and contents say they are."""

import bz2
import codecs
import glob
import gzip
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from experiments.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def _open_zstd(path, mode):
    # What `zstd --long=31` writes, too.
    return zstd.open(
        path, mode, options={zstd.DecompressionParameter.window_log_max: 31}
    )


# Of text, and of tables, whose rows are examples.
KINDS = (".jsonl", ".json", ".txt", ".parquet")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_OPENERS = {
    "": open,
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
}
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)

# How a file begins that is none of ours, or needs its suffix.
_COMPRESSED = {
    b"\x1f\x8b": ".gz",
    b"\xfd7zXZ\0": ".xz",
    b"BZh": ".bz2",
    b"\x28\xb5\x2f\xfd": ".zst",
}
_OTHERS = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"ARROW1": "Arrow",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "an SQLite database",
    b"ustar": "a tar archive",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}
_HEAD_BYTES = 4096


class Files(NamedTuple):
    """Files of text.

    Attributes:
        paths: At least one, sorted; each has a suffix of a kind that can be read.
        name: What they are, in words.
    """

    paths: list[Path]
    name: str


class Format(NamedTuple):
    """What the suffixes of a file say.

    Attributes:
        kind: One of :data:`KINDS` or :data:`TABLES`.
        compression: The suffix behind it; may be empty.
    """

    kind: str
    compression: str

    def open(self, path: Path) -> BinaryIO:
        """Opens the file for reading its decompressed bytes."""
        opener = cast(Callable[..., BinaryIO], _OPENERS[self.compression])
        return opener(path, "rb")


def find_files(pattern: str, kinds: tuple[str, ...] = KINDS) -> Files:
    """Finds the files that a path, a folder or a glob names.

    Args:
        pattern: A file; a folder, whose files of a known suffix are taken, hidden ones
            and those of its subfolders left out; or a glob such as ``c4/*.json.gz``
            (``**`` crosses folders). ``~`` is the home directory.
        kinds: Suffixes that can be read.

    Raises:
        UserError: If there is no file, or one that cannot be read by its name.
    """
    expanded = os.path.expanduser(pattern)
    # Before globbing, because a file's own name may contain glob characters.
    if os.path.isfile(expanded):
        matches = [expanded]
    elif os.path.isdir(expanded):
        return _folder(pattern, Path(expanded), kinds)
    else:
        matches = sorted(filter(os.path.isfile, glob.glob(expanded, recursive=True)))
    if not matches:
        raise UserError(
            f"no file matches {pattern!r} from {os.getcwd()}; check the path, and put "
            "a glob in quotes"
        )
    paths = list(map(Path, matches))
    for path in paths:
        format_of(path, kinds)
    return Files(
        paths, pattern if len(paths) == 1 else f"{pattern} ({len(paths)} files)"
    )


def format_of(path: Path, kinds: tuple[str, ...] = KINDS) -> Format:
    """Returns what the suffixes of a file say, its kind one of ``kinds``.

    Raises:
        UserError: If they are not known; it says what the file holds, and how it could
            be read.
    """
    known = _known_format(path, kinds)
    if known is None:
        raise _misnamed(path, "has no known suffix, but holds", kinds)
    return known


def not_as_named(
    path: Path, named: Format, kinds: tuple[str, ...] = KINDS
) -> UserError | None:
    """Returns the error for a file that holds something else than its name says.

    None: what it holds is not known to be something else.
    """
    is_compressed_so = _compression(_head(path)) == named.compression
    if is_compressed_so and _content_of(path)[0] not in _OTHERS.values():
        return None
    return _misnamed(path, f"is named {''.join(named)}, but holds", kinds)


def _known_format(path, kinds):
    name = path.name.lower()
    for compression in _OPENERS:
        for kind in kinds:
            is_possible = not compression or kind != ".parquet"
            if is_possible and name.endswith(kind + compression):
                return Format(kind, compression)
    return None


def _folder(pattern, folder, kinds):
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserError(f"{pattern} cannot be listed ({error.strerror})") from error
    files = [path for path in files if not path.name.startswith(".")]
    paths = [path for path in files if _known_format(path, kinds)]
    if not paths:
        raise UserError(
            f"the folder {pattern} has no file that can be read ({_listed(kinds)}); "
            "for those of its subfolders give a quoted glob, "
            f"'{folder / '**' / '*.parquet'}'"
        )
    names = f"{len(paths)} files, {paths[0].name} to {paths[-1].name}"
    if len(paths) == 1:
        names = f"1 file, {paths[0].name}"
    left_out = len(files) - len(paths)
    others = f"; {left_out} of another kind left out" if left_out else ""
    return Files(paths, f"{pattern} ({names}{others})")


def _listed(kinds):
    *others, last = [kind for kind in kinds if kind != ".parquet"]
    return (
        f"{', '.join(others)} or {last}, also with .gz, .xz, .bz2 or .zst behind it, "
        "or .parquet"
    )


def _misnamed(path, how, kinds):
    words, suffix = _content_of(path)
    if path.suffix.lower() in TABLES and path.suffix.lower() not in KINDS:
        words, suffix = "a table in text", None
    if suffix is not None and not suffix.startswith(kinds):
        suffix = None
    if suffix is None:
        known = _listed(kinds)
        target = f"UTF-8 (iconv) or {known}" if words.startswith("text") else known
        return UserError(f"{path} {how} {words}; convert it to {target}")
    bare = path.with_suffix("")
    if bare.suffix.lower() in kinds:
        bare = bare.with_suffix("")
    return UserError(f"{path} {how} {words}; rename it to {bare.name}{suffix}")


def _content_of(path):
    """Returns what a file holds, in words, and the suffix to read it by or None."""
    head = _head(path)
    compression = _compression(head)
    if not compression:
        return _plain_content(head)
    try:
        with Format("", compression).open(path) as file:
            words, suffix = _plain_content(file.read(_HEAD_BYTES))
    except READ_ERRORS:
        return f"damaged {compression} data", None
    is_readable = suffix not in (None, ".parquet")
    return f"{words} in {compression}", suffix + compression if is_readable else None


def _head(path):
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({error.strerror}); check its permissions"
        ) from error


def _compression(head):
    found = (end for magic, end in _COMPRESSED.items() if head.startswith(magic))
    return next(found, "")


def _plain_content(head):
    for magic, words in _OTHERS.items():
        # A tar archive begins with a name.
        if head.startswith(magic, 257 if magic == b"ustar" else 0):
            return words, ".parquet" if words == "Parquet" else None
    try:
        # What is cut off may end within a character.
        decoder = codecs.getincrementaldecoder("utf-8")()
        text = decoder.decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        return ("binary data" if b"\0" in head else "text that is not UTF-8"), None
    if "\0" in text:
        return "binary data", None
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return "JSON", ".jsonl"
    return ("plain text" if text else "nothing"), ".txt"
