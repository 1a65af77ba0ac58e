"""The tables of a suite with several tasks: methods down, tasks across."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suite import Suite
from experiments.comparison.tuning_report import (
    COSTS,
    NOTES,
    best,
    cost,
    finished_runs,
    last,
    origin,
    words,
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
    rows = {
        task: {row.method: row for row in rows_of(records, measure)}
        for task, records in tasks.items()
    }
    titles = {task: _title(task, found, suite) for task, found in rows.items()}
    tables: dict[str, Callable[[Row], str]] = {
        "Last validation": lambda row: last(row, measure),
        "Best validation": lambda row: best(row, measure),
        "Seeds": lambda row: str(len(row.losses)),
        **{
            title[0].upper() + title[1:]: lambda row, title=title: cost(row, title)
            for title in COSTS
        },
    }
    parts = [
        f"# {name}\n\n{suite.description[0].upper()}{suite.description[1:]}. Mean over "
        "the seeds ± standard deviation (n - 1). Best: of the validations of each run. "
        f"{NOTES}\n"
    ]
    methods = [contender.name for contender in suite.contenders]
    for title, cell in tables.items():
        heads = titles if "validation" in title else {task: task for task in titles}
        parts.append(f"## {title}\n\n{_table(methods, rows, heads, cell)}")
    sources = [f"- {task}: {origin(records)}" for task, records in tasks.items()]
    return "\n".join([*parts, "## Runs\n", *sources]) + "\n"


def _title(task: str, rows: Mapping[str, Row], suite: Suite) -> str:
    """Returns the name of a task and of what is compared."""
    if not suite.measure.is_larger_better:
        return f"{task}, loss"
    runs = [run for row in rows.values() for run in finished_runs(row)]
    return f"{task}, {words(runs[0]['metric'])}" if runs else task


def _table(
    methods: Sequence[str],
    rows: Mapping[str, Mapping[str, Row]],
    titles: Mapping[str, str],
    cell: Callable[[Row], str],
) -> str:
    lines = [
        f"| method | {' | '.join(titles.values())} |",
        f"|{'---|' * (1 + len(titles))}",
    ]
    for method in methods:
        found = [rows[task].get(method) for task in titles]
        if any(found):
            cells = [cell(row) if row else "" for row in found]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
