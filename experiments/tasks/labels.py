"""The labels of rows: numbers of classes, or real numbers."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.tasks.rows import Place, Rows, kind_of
from experiments.tasks.table import TaskKind

_FLAG = "--label-column"
_MOST_LISTED = 12


def read_labels(
    task: TaskKind, train: Rows, validation: dict[str, Rows], column: str
) -> tuple[tuple[str, ...], np.ndarray, dict[str, np.ndarray]]:
    """Returns the names of the classes, the training and the validation labels.

    A class is given by its name or by its number. Where the task does not name the
    classes, they are those of the training rows, and of rows held out of the same file:
    texts in alphabetical, integers in numerical order, also if the file spells them as
    text.

    Returns:
        Names, none for numbers; labels, (n,), int32 or float32; the same by split.

    Raises:
        UserError: If a row has no label, one of another kind or outside the range, or
            the training rows have one class alone; row and label are named.
    """
    values = train.column(column, _FLAG)
    others = {name: rows.column(column, _FLAG) for name, rows in validation.items()}
    if task.kind == "number":
        names, number_of, dtype = (), _to_number(task), np.float32
    else:
        names = task.label_names or _found_names(
            *_of_one_file(train, values, validation, others)
        )
        number_of, dtype = _to_class(names, bool(task.label_names)), np.int32

    def labels(values, rows):
        numbers = map(number_of, values, rows.places)
        return np.fromiter(numbers, dtype, len(rows))

    numbers = labels(values, train)
    parts = {name: labels(others[name], rows) for name, rows in validation.items()}
    return names, numbers, parts


def _of_one_file(train, values, validation, others):
    """Returns labels and places of the training rows and of what was held out."""
    values, places = list(values), list(train.places)
    for name, rows in validation.items():
        if rows.origins and rows.origins == train.origins:
            values += others[name]
            places += rows.places
    return values, places


def _found_names(values: Iterable[Any], places: list[Place]) -> tuple[str, ...]:
    """Returns the names of the classes, sorted."""
    kinds, names = {}, set()
    for value, place in zip(values, places, strict=True):
        names.add(_spelled(value, place))
        kinds.setdefault(kind_of(value), (value, place))
    if len(kinds) > 1:
        (first, place), (second, other) = list(kinds.values())[:2]
        raise UserError(
            f"{other}: the label {second!r} is {kind_of(second)}, but {first!r} of "
            f"{place.unit} {place.number} is {kind_of(first)}; spell all labels alike"
        )
    if len(names) == 1:
        raise UserError(
            f"all training rows have the label {names.pop()!r}; give rows of two "
            f"classes or more, or name another column by {_FLAG}"
        )
    # Python reads no more than 4,300 digits. "01" is another class than "1".
    if all(len(x) < 100 and x.removeprefix("-").isdecimal() for x in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _to_class(names, is_known_before):
    numbers = {name: i for i, name in enumerate(names)}
    if is_known_before:
        numbers |= {str(i): i for i in range(len(names))}

    def to_class(value, place):
        name = _spelled(value, place)
        if name in numbers:
            return numbers[name]
        if name == "-1" and is_known_before:
            raise UserError(
                f"{place}: the label is -1: GLUE's test rows have none; validate on "
                "its validation rows"
            )
        listed = ", ".join(names[:_MOST_LISTED]) + ", ..." * (len(names) > _MOST_LISTED)
        if is_known_before:
            listed = f"0 to {len(names) - 1} ({listed})"
        whose = "the task's" if is_known_before else "those of the training rows"
        raise UserError(
            f"{place}: the label {value!r} is none of {whose}: {listed}; repair that "
            f"row, or name another column by {_FLAG}"
        )

    return to_class


def _spelled(value: Any, place: Place) -> str:
    """Returns the name of a class as a text file would spell it."""
    _check_labelled(value, place)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"{place}: the label {value!r} is a number, not a class; use --task "
                f"regression, or name another column by {_FLAG}"
            )
        return str(int(value))
    if not isinstance(value, int | str):
        raise UserError(
            f"{place}: the label is {kind_of(value)}, not text or an integer; name "
            f"another column by {_FLAG}"
        )
    return str(value)


def _to_number(task):
    low, high = task.range or (-math.inf, math.inf)

    def to_number(value, place):
        _check_labelled(value, place)
        try:
            # bool is an int to Python.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= float(np.finfo(np.float32).max):
            shown = repr(value)[:100]
            raise UserError(
                f"{place}: the label {shown} is no finite number in float32; repair "
                f"that row, or name another column by {_FLAG}"
            )
        if not low <= number <= high:
            why = "; GLUE's test rows have no label" if number == -1 else ""
            raise UserError(
                f"{place}: the label {value!r} is outside {low:g} to {high:g}{why}; "
                "give rows with labels"
            )
        return number

    return to_number


def _check_labelled(value, place):
    if value is None or value == "":
        raise UserError(
            f"{place}: there is no label; leave out rows without one, or name another "
            f"column by {_FLAG}"
        )
