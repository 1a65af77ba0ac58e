"""The text that ``--data`` names: what a run trains on and what it validates on."""

import dataclasses
import itertools
import platform
from collections.abc import Iterable

from experiments.data.documents import find_files, read_documents
from experiments.data.embedded_text import standard_library
from experiments.data.streaming import load_c4, texts
from experiments.errors import UserError

_STREAMED_VALIDATION_TOKENS = 500_000


@dataclasses.dataclass(frozen=True)
class Source:
    """Text of a run, not read yet; each iterable can be read once.

    Attributes:
        name: The training text, in words.
        train: Its documents; None: streamed, see :mod:`experiments.data.streaming`.
        validation_name: The validation text, in words.
        validation: Its documents; None: to be held out of the training text.
        max_validation_tokens: How much of ``validation`` to use; None: all.
    """

    name: str
    train: Iterable[str] | None
    validation_name: str = ""
    validation: Iterable[str] | None = None
    max_validation_tokens: int | None = None


def open_source(spec: str, validation_spec: str | None) -> Source:
    """Finds the text; files are opened only when their documents are read.

    Args:
        spec: ``embedded``, ``c4``, or a path or glob.
        validation_spec: Path or glob to validate on instead of the source's own part.

    Raises:
        UserError: If no file matches, or one is in both parts.
    """
    files = [] if spec in ("embedded", "c4") else find_files(spec)
    if spec == "embedded":
        source = _embedded()
    elif spec == "c4":
        source = _c4()
    else:
        source = Source(_name(spec, files), _documents(files))
    if validation_spec is None:
        return source
    validation_files = find_files(validation_spec)
    _check_disjoint(files, validation_files)
    return dataclasses.replace(
        source,
        validation_name=_name(validation_spec, validation_files),
        validation=_documents(validation_files),
        max_validation_tokens=None,
    )


def _embedded():
    text = standard_library()
    name = f"standard library of Python {platform.python_version()}"
    if text.undecodable:
        name += f" ({text.undecodable} files left out: not in their declared encoding)"
    return Source(
        name=name,
        train=text.train,
        validation_name="1 in 20 of its files, by a hash of the path",
        validation=text.validation,
    )


def _c4():
    return Source(
        name="allenai/c4 en, streamed",
        train=None,
        validation_name="the beginning of its validation split",
        validation=_c4_validation(),
        max_validation_tokens=_STREAMED_VALIDATION_TOKENS,
    )


def _c4_validation():
    # A generator, so that nothing is opened when another text takes its place.
    yield from texts(load_c4("validation"))


def _documents(files):
    return itertools.chain.from_iterable(map(read_documents, files))


def _name(spec, files):
    return spec if len(files) == 1 else f"{spec} ({len(files)} files)"


def _check_disjoint(files, validation_files):
    known = {path.resolve() for path in files}
    for path in validation_files:
        if path.resolve() in known:
            raise UserError(
                f"{path} is in both the training and the validation text; "
                "take it out of one of them"
            )
