"""The text that ``--data`` names: what a run trains on and what it validates on."""

import dataclasses
import itertools
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data.documents import read_documents
from experiments.data.embedded_text import standard_library
from experiments.data.files import find_files, format_of
from experiments.data.hub import HubText, check_column, open_splits, parse_hub_text
from experiments.data.streaming import Stream
from experiments.errors import UserError

_STREAMED_VALIDATION_TOKENS = 500_000
_DEFAULT_COLUMN = "text"
_EMBEDDED_VALIDATION = "1 in 20 of its files, by a hash of the path"


@dataclasses.dataclass(frozen=True)
class Source:
    """Text of a run, not read yet; each iterable can be read once.

    Attributes:
        name: The training text, in words.
        train: Its documents.
        validation_name: The validation text, in words.
        validation: Its documents; None: to be held out of the training text.
        max_validation_tokens: How much of ``validation`` to use; None: all.
    """

    name: str
    train: Iterable[str] | Stream
    validation_name: str = ""
    validation: Iterable[str] | None = None
    max_validation_tokens: int | None = None


class _Text(NamedTuple):
    """Documents in words and as they are; the files or the split that hold them."""

    name: str
    documents: Iterable[str]
    origins: Sequence[Path | HubText]
    has_columns: bool


def open_source(
    spec: str, validation_spec: str | None, column: str = _DEFAULT_COLUMN
) -> Source:
    """Finds the text; files are opened only when their documents are read.

    Args:
        spec: ``embedded``; ``c4`` or another :class:`experiments.data.hub.HubText`; or
            a path, folder or glob, see :func:`experiments.data.files.find_files`.
        validation_spec: The text to validate on instead of the source's own part; what
            ``spec`` may be, but ``embedded``.
        column: Of JSON lines, Parquet and the hub's data sets, that holds the text.

    Raises:
        UserError: If no file matches, one is in both parts, the hub cannot be read, a
            text on it has no part to validate on, or the column is asked of text
            without columns.
    """
    hub_text = parse_hub_text(spec)
    origins, has_columns = [], hub_text is not None
    if hub_text is not None:
        source = _streamed(hub_text, column, validation_spec is None)
        origins = [hub_text._replace(split=hub_text.split or "train")]
    elif spec == "embedded":
        source = _embedded()
    else:
        text = _files(spec, column)
        source = Source(text.name, text.documents)
        origins, has_columns = text.origins, text.has_columns
    if validation_spec is not None:
        text = _validation(validation_spec, column)
        _check_disjoint(origins, text.origins)
        has_columns |= text.has_columns
        is_streamed = parse_hub_text(validation_spec) is not None
        source = dataclasses.replace(
            source,
            validation_name=text.name,
            validation=text.documents,
            max_validation_tokens=_STREAMED_VALIDATION_TOKENS if is_streamed else None,
        )
    if column != _DEFAULT_COLUMN and not has_columns:
        raise UserError(
            f"--text-column {column}: {source.name} has no columns; leave it out"
        )
    return source


def open_text(spec: str, column: str = _DEFAULT_COLUMN) -> tuple[str, Iterable[str]]:
    """Finds one text that is not trained on; returns its name and its documents.

    Args:
        spec: What ``validation_spec`` of :func:`open_source` may be, or ``embedded``:
            the validation part.
        column: As there.

    Raises:
        UserError: If no file matches, the hub cannot be read, or the column is asked of
            text without columns.
    """
    if spec == "embedded":
        name, documents, has_columns = _EMBEDDED_VALIDATION, None, False
        documents = standard_library().validation
    else:
        name, documents, _, has_columns = _validation(spec, column)
    if column != _DEFAULT_COLUMN and not has_columns:
        raise UserError(f"--text-column {column}: {name} has no columns; leave it out")
    return name, documents


def _embedded():
    text = standard_library()
    name = f"standard library of Python {platform.python_version()}"
    if text.undecodable:
        name += f" ({text.undecodable} files left out: not in their declared encoding)"
    return Source(
        name=name,
        train=text.train,
        validation_name=_EMBEDDED_VALIDATION,
        validation=text.validation,
    )


def _streamed(text: HubText, column: str, has_own_validation: bool) -> Source:
    splits = open_splits(text)
    split = _choose(text, splits, "train")
    stream = Stream(str(text), splits[split], column)
    check_column(stream.dataset, column, stream.name)
    source = Source(f"{text}, streamed, empty documents left out", stream)
    if not has_own_validation:
        return source
    if "validation" in splits and split != "validation":
        name = "the beginning of its validation split"
        held_out = splits["validation"]
    elif stream.shards > 1:
        # The last one, whose beginning is as good as the whole.
        name = f"the beginning of the last of its {stream.shards} files, held out"
        held_out = stream.shard(stream.shards - 1)
        source = dataclasses.replace(
            source, train=dataclasses.replace(stream, held_out=1)
        )
    else:
        raise UserError(
            f"{text} has neither a validation split nor a second file to hold out; "
            "give --validation-data, a file or hub:owner/name:configuration:split"
        )
    return dataclasses.replace(
        source,
        validation_name=name,
        validation=stream.texts(held_out),
        max_validation_tokens=_STREAMED_VALIDATION_TOKENS,
    )


def _validation(spec: str, column: str) -> _Text:
    hub_text = parse_hub_text(spec)
    if hub_text is None:
        return _files(spec, column)
    splits = open_splits(hub_text)
    split = _choose(hub_text, splits, "validation")
    origin = hub_text._replace(split=split)
    stream = Stream(str(origin), splits[split], column)
    check_column(stream.dataset, column, stream.name)
    documents = stream.texts(stream.dataset)
    return _Text(f"the beginning of {origin}", documents, [origin], True)


def _choose(text, splits, default):
    split = text.split or default
    if split not in splits:
        raise UserError(
            f"{text.name} has no split {split!r}, but {', '.join(splits)}; name one: "
            f"hub:{text.name}:{text.configuration or ''}:{next(iter(splits))}"
        )
    return split


def _files(spec: str, column: str) -> _Text:
    found = find_files(spec)
    has_columns = any(format_of(path).kind != ".txt" for path in found.paths)
    return _Text(found.name, _documents(found.paths, column), found.paths, has_columns)


def _documents(paths: list[Path], column: str) -> Iterator[str]:
    read = (read_documents(path, column) for path in paths)
    return itertools.chain.from_iterable(read)


def _check_disjoint(origins, validation_origins):
    def resolved(origin):
        return origin.resolve() if isinstance(origin, Path) else origin

    known = set(map(resolved, origins))
    for origin in validation_origins:
        if resolved(origin) in known:
            raise UserError(
                f"{origin} is in both the training and the validation text; "
                "take it out of one of them"
            )
