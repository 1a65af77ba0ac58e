"""The report of a comparison that fine-tunes: a table in Markdown, and figures."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.comparison.charts import draw
from experiments.comparison.markdown import markdown
from experiments.comparison.measures import Measure
from experiments.comparison.origin import origin
from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suite import Suite


class Number(NamedTuple):
    """A number of a run, as a table has it.

    Attributes:
        of: Record of a finished run -> the number; None: the run has none.
        form: How its mean is written, as :func:`format` takes it.
    """

    of: Callable[[Mapping[str, Any]], float | None]
    form: str


def write_tuning_report(
    directory: Path, name: str, suite: Suite, records: Sequence[Mapping[str, Any]]
) -> None:
    """Writes table.md and figures of the finished runs.

    Args:
        directory: Directory of the comparison.
        name: Name of the suite.
        suite: The suite, or the suite of one task.
        records: Lines of results.jsonl.
    """
    rows = rows_of(records, suite.measure)
    heading = (
        f"Suite {name}, {suite.description}: {origin(records)}. Last and best: mean "
        "over the seeds ± standard deviation (n - 1); best is the best validation of "
        f"each run. {NOTES} Runs: all that the method was given.\n\n"
    )
    (directory / "table.md").write_text(heading + tuning_table(rows, suite.measure))
    finished = [row for row in rows if np.isfinite(row.mean)]
    label = suite.measure.label
    if suite.measure.is_larger_better:
        label = f"validation {title(rows, suite.measure)}"
    draw(directory, finished, suite.measure, label)


NOTES = (
    "State: bytes at the end of the run, in millions. Rank: mean over steps and "
    "matrices; effective rank: R_adap of AdaRankGrad. Peak: of the compiled step, in "
    "millions of bytes."
)


def tuning_table(rows: Sequence[Row], measure: Measure) -> str:
    """Returns the table of one task in Markdown."""
    name = title(rows, measure)
    numbers = _others(rows, measure) | COSTS
    heads = [
        *("method", "rates: rest, blocks", f"{name}, last", f"{name}, best", "seeds"),
        *(*numbers, "runs", "diverged"),
    ]
    lines = []
    for row in rows:
        cells = [
            *(row.method, row.rates, last(row, measure), best(row, measure)),
            str(len(row.losses)),
            *(mean(row, number) for number in numbers.values()),
            *(str(row.tried), row.divergences),
        ]
        lines.append(cells)
    return markdown(heads, lines)


def title(rows: Iterable[Row], measure: Measure) -> str:
    """Returns the name of what is compared: the loss, or the metric of the task."""
    runs = [run for row in rows for run in finished_runs(row)]
    if not measure.is_larger_better or not runs:
        return measure.name
    return _words(runs[0]["metric"])


def finished_runs(row: Row) -> list[Mapping[str, Any]]:
    """Returns the runs of a row that have a summary."""
    return [run for run in row.runs if run["status"] == "finished"]


def last(row: Row, measure: Measure) -> str:
    """Returns mean and deviation of what is compared, at the end of the runs."""
    return _spread(map(measure.flipped, row.losses))


def best(row: Row, measure: Measure) -> str:
    """Returns mean and deviation of the best validation of each run."""
    if not np.isfinite(row.mean):
        return "diverged"
    curves = [[point[2] for point in run["validation_curve"]] for run in row.runs]
    return _spread(map(measure.best, curves))


def mean(row: Row, number: Number) -> str:
    """Returns the mean of a number of the finished runs; empty if none has it."""
    found = [number.of(run) for run in finished_runs(row)]
    found = [x for x in found if x is not None]
    return format(statistics.mean(found), number.form) if found else ""


def _others(rows: Iterable[Row], measure: Measure) -> dict[str, Number]:
    """Returns the numbers of validations, by their names, but for what is compared."""
    runs = [run for row in rows for run in finished_runs(row)]
    names = list(runs[0]["last_metrics"]) if runs else []
    found = {_words(name): Number(_metric(name), ".4f") for name in names}
    found["loss"] = Number(lambda run: run["validation_loss"], ".4f")
    return {k: x for k, x in found.items() if k != title(rows, measure)}


def _rank(run: Mapping[str, Any]) -> float | None:
    means = [float(np.mean(ranks)) for ranks in (run["mean_ranks"] or {}).values()]
    return statistics.mean(means) if means else None


COSTS = {
    "block state": Number(lambda run: run["block_state_bytes"] / 1e6, ".3f"),
    "whole state": Number(lambda run: run["optimizer_state_bytes"] / 1e6, ".3f"),
    "rank": Number(_rank, ".2f"),
    "effective rank": Number(lambda run: run["effective_rank"], ".2f"),
    "seconds per step": Number(lambda run: run["step_seconds"], ".3f"),
    "peak": Number(
        lambda run: run["step_peak_bytes"] and run["step_peak_bytes"] / 1e6, ".0f"
    ),
}


def _metric(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: run["last_metrics"][name]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _spread(numbers: Iterable[float]) -> str:
    found = list(numbers)
    if not np.all(np.isfinite(found)):
        return "diverged"
    if len(found) == 1:
        return f"{found[0]:.4f}"
    return f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
