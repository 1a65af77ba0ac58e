"""Rows of examples: from files, or from a data set of the Hugging Face hub."""

import csv
import dataclasses
import functools
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from experiments.data.columns import check_characters, no_column
from experiments.data.files import TABLES, Format, find_files, format_of
from experiments.data.hub import HubText, hub_errors, open_splits, parse_hub_text
from experiments.data.lines import json_object, read_opened, text_lines
from experiments.errors import UserError

_AN_OBJECT_PER_LINE = 'write one JSON object per line, such as {"text": "..."}'
_A_ROW_PER_LINE = "write one row per line, and the names of the columns in line 1"


class Place(NamedTuple):
    """Where a row is.

    Attributes:
        source: The file, or the data set.
        unit: "line" or "row".
        number: From 1.
    """

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in memory, at least one.

    Attributes:
        name: Where they are from, in words.
        values: Each row's values by column.
        places: Of each row.
        origins: The files or the split that hold them.
    """

    name: str
    values: list[dict[str, Any]]
    places: list[Place]
    origins: tuple[Path | HubText, ...]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: Sequence[int], name: str) -> "Rows":
        """Returns some of the rows under another name."""
        return Rows(
            name,
            [self.values[i] for i in places],
            [self.places[i] for i in places],
            self.origins,
        )

    def column(self, name: str, flag: str) -> list[Any]:
        """Returns the value of each row.

        Args:
            name: Of a column.
            flag: That names the column, for errors.

        Raises:
            UserError: If a row has no such column; it names those that are there.
        """
        try:
            return [row[name] for row in self.values]
        except KeyError:
            bad = next(i for i, row in enumerate(self.values) if name not in row)
            place = str(self.places[bad])
            mend = f"name the right one by {flag}"
            raise no_column(name, self.values[bad], place, mend) from None

    def texts(self, name: str, flag: str = "--text-columns") -> list[str]:
        """Returns the text of each row; it may be empty.

        Args:
            name: Of a column of text.
            flag: That names the column, for errors.

        Raises:
            UserError: If there is no such column, or a row's value is no text.
        """
        texts = self.column(name, flag)
        for text, place in zip(texts, self.places, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"{place}: column {name!r} holds {kind_of(text)}, not text; repair "
                    f"that row, or name another column by {flag}"
                )
            if not text.isascii():
                check_characters(text, name, str(place))
        return texts


def read_rows(spec: str, split: str = "train") -> Rows:
    """Reads all rows of a table.

    Args:
        spec: A file, a folder or a glob, see :func:`experiments.data.files.find_files`:
            JSON lines (``.jsonl``, ``.json``), ``.csv`` (quoted as spreadsheets do) or
            ``.tsv`` (as GLUE has it: a tab between two cells, nothing quoted), both
            with the columns' names in the first line, each also compressed
            (``.gz``, ``.xz``, ``.bz2``, ``.zst``), or ``.parquet``. Or
            ``hub:owner/name:configuration:split``, see :mod:`experiments.data.hub`.
        split: Of a data set of the hub that names none.

    Raises:
        UserError: If there is no such file or split, it has no row, or it cannot be
            read; file and line are named.

    Example:
        >>> read_rows("missing.csv")
        Traceback (most recent call last):
        experiments.errors.UserError: no file matches 'missing.csv' from ...
    """
    hub_text = parse_hub_text(spec)
    if hub_text is not None:
        return _hub_rows(hub_text._replace(split=hub_text.split or split))
    found = find_files(spec, TABLES)
    values, places = [], []
    for path in found.paths:
        for place, row in _file_rows(path):
            values.append(row)
            places.append(place)
    return Rows(found.name, values, places, tuple(found.paths))


def kind_of(value: Any) -> str:
    """Returns what a value is, in the words of JSON."""
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    kinds |= {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _hub_rows(text: HubText) -> Rows:
    splits = open_splits(text)
    if text.split not in splits:
        raise UserError(
            f"{text.name} has no split {text.split!r}, but {', '.join(splits)}; name "
            f"one: hub:{text.name}:{text.configuration or ''}:{next(iter(splits))}"
        )
    with hub_errors(text.name):
        values = [dict(row) for row in splits[text.split]]
    if not values:
        raise UserError(f"{text} has no rows; name another split")
    places = [Place(str(text), "row", i + 1) for i in range(len(values))]
    return Rows(str(text), values, places, (text,))


def _file_rows(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    named = format_of(path, TABLES)
    parse = functools.partial(_parse, path, named)
    return read_opened(path, named, parse, TABLES)


def _parse(path: Path, named: Format, file: BinaryIO):
    if named.kind == ".parquet":
        # A second's import that other files need not wait for.
        from experiments.data.parquet import parquet_rows

        for number, row in enumerate(parquet_rows(path, file), 1):
            yield Place(str(path), "row", number), row
    elif named.kind in (".csv", ".tsv"):
        cells = _tab_separated if named.kind == ".tsv" else _comma_separated
        lines = text_lines(path, named, file, _A_ROW_PER_LINE, TABLES)
        yield from _table(path, cells(path, lines))
    else:
        for number, line in text_lines(path, named, file, _AN_OBJECT_PER_LINE, TABLES):
            # A blank line holds no row; editors leave them at the end of a file.
            if line.strip(string.whitespace):
                place = Place(str(path), "line", number)
                yield place, json_object(line, str(place), _AN_OBJECT_PER_LINE)


def _table(path, numbered_cells):
    """Yields place and row of each line of cells but the first, which names columns."""
    names, has_row = None, False
    for number, cells in numbered_cells:
        place = Place(str(path), "line", number)
        if names is None:
            names = cells
            twice = next((name for name in cells if cells.count(name) > 1), None)
            if twice is not None:
                raise UserError(
                    f"{place}: two columns are named {twice!r}; {_A_ROW_PER_LINE}"
                )
        elif len(cells) != len(names):
            raise UserError(
                f"{place}: {_count(len(cells), 'cell')}, but line 1 names "
                f"{_count(len(names), 'column')}; {_A_ROW_PER_LINE}"
            )
        else:
            has_row = True
            yield place, dict(zip(names, cells, strict=True))
    if names is not None and not has_row:
        raise UserError(f"{path} has no row behind the names of its columns; add some")


def _tab_separated(path, lines):
    del path
    for number, line in lines:
        if bare := line.rstrip("\r\n"):
            yield number, bare.split("\t")


def _comma_separated(path, lines):
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in lines), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            # A quoted cell may go on over lines: a row is where it begins.
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {number}: not CSV ({error}); put text with commas, quotes "
            "or line ends in quotes, and double the quotes in it"
        ) from error


def _count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)
