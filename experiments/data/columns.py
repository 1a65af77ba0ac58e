"""The text of a row: its column, and what is said where there is none."""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.errors import UserError

_MOST_NAMES = 12
_TEXT_FLAG = "name the one with the text by --text-column"


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """Returns the text of a row; null is an empty document.

    Args:
        row: Values by column.
        column: The one with the text.
        where: File and line, or what else is named in errors.

    Raises:
        UserError: If there is no such column, or it does not hold text.
    """
    if column not in row:
        raise no_column(column, row, where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise no_text(column, type(text).__name__, where)
    check_characters(text, column, where)
    return text


def check_characters(text: str, column: str, where: str) -> None:
    """Raises UserError if a text has what no tokenizer can encode."""
    try:
        # JSON can spell half of a surrogate pair.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {column!r} has a lone surrogate "
            f"\\u{ord(text[error.start]):04x} at character {error.start}, which is not "
            "UTF-8; repair that line"
        ) from error


def no_column(
    column: str, columns: Iterable[str], where: str, mend: str = _TEXT_FLAG
) -> UserError:
    """Returns the error that lists the columns there are, and how to mend it."""
    names = list(columns)
    more = f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
    listed = ", ".join(map(str, names[:_MOST_NAMES])) + more
    return UserError(
        f"{where}: there is no column {column!r}, but {listed or 'no column at all'}; "
        f"{mend}"
    )


def no_text(column: str, kind: str, where: str) -> UserError:
    """Returns the error for a column that holds something else."""
    return UserError(
        f"{where}: column {column!r} holds {kind}, not text; name another by "
        "--text-column"
    )
