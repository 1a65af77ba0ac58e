"""The tables of a suite with several tasks: methods down, tasks across."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.comparison.markdown import markdown
from experiments.comparison.origin import origin
from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suite import Suite
from experiments.comparison.tuning_report import (
    COSTS,
    NOTES,
    best,
    last,
    mean,
    title,
)


def joined_table(
    name: str, suite: Suite, tasks: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Returns the joined tables in Markdown.

    Args:
        name: Name of the suite.
        suite: The suite.
        tasks: Records of each task that has some, by its name.
    """
    measure = suite.measure
    rows = {task: rows_of(records, measure) for task, records in tasks.items()}
    names = {task: f"{task}, {title(rows[task], measure)}" for task in tasks}
    costs = {
        name.capitalize(): functools.partial(mean, number=number)
        for name, number in COSTS.items()
    }
    # Title -> the heads by task, and what is in a cell.
    tables: dict[str, tuple[Mapping[str, str], Callable[[Row], str]]] = {
        "Last validation": (names, lambda row: last(row, measure)),
        "Best validation": (names, lambda row: best(row, measure)),
        "Seeds": ({}, lambda row: str(len(row.losses))),
        **{name: ({}, cell) for name, cell in costs.items()},
    }
    methods = [contender.name for contender in suite.contenders]
    parts = [
        f"# {name}\n\n{suite.description[0].upper()}{suite.description[1:]}. Mean over "
        "the seeds ± standard deviation (n - 1). Best: of the validations of each run. "
        f"{NOTES}\n"
    ]
    for heading, (heads, cell) in tables.items():
        columns = {heads.get(task, task): rows[task] for task in tasks}
        parts.append(f"## {heading}\n\n{_table(methods, columns, cell)}")
    sources = [f"- {task}: {origin(records)}" for task, records in tasks.items()]
    return "\n".join([*parts, "## Runs\n", *sources]) + "\n"


def _table(
    methods: Sequence[str],
    columns: Mapping[str, Sequence[Row]],
    cell: Callable[[Row], str],
) -> str:
    """Returns a table: methods that have a row in a column down, columns across."""
    found = [{row.method: cell(row) for row in rows} for rows in columns.values()]
    return markdown(
        ["method", *columns],
        [
            [method, *(cells.get(method, "") for cells in found)]
            for method in methods
            if any(method in cells for cells in found)
        ],
    )
