"""The report of a comparison that fine-tunes: a table in Markdown, and figures."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.charts import draw
from experiments.comparison.measures import Measure
from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suite import Suite


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
    if suite.measure.is_larger_better and finished:
        label = f"validation {words(finished[0].runs[0]['metric'])}"
    draw(directory, finished, suite.measure, label)


NOTES = (
    "State: bytes at the end of the run, in millions. Rank: mean over steps and "
    "matrices; effective rank: R_adap of AdaRankGrad. Peak: of the compiled step, in "
    "millions of bytes."
)


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns model, task, length, data, device and commits of some runs."""
    first = min(records, key=lambda record: record["status"] != "finished")
    commits = sorted({record["commit"] for record in records})
    data = " ".join(str(first["data"]).split())
    return (
        f"{first['model']} on {first['task']}, {first['steps']} steps; {data}; "
        f"{first['device']}; of commit {', '.join(commits)}"
    )


def tuning_table(rows: Sequence[Row], measure: Measure) -> str:
    """Returns the table of one task in Markdown."""
    runs = [run for row in rows for run in finished_runs(row)]
    name = words(runs[0]["metric"]) if runs else "metric"
    others = (
        [x for x in runs[0]["last_metrics"] if x != runs[0]["metric"]] if runs else ()
    )
    if not measure.is_larger_better:
        name = "loss"
    lines = [
        f"| method | rates: rest, blocks | {name}, last | {name}, best "
        + "".join(f"| {words(other)} " for other in others)
        + "| loss | seeds | block state | whole state | rank | effective rank "
        "| s/step | peak | runs | diverged |",
        f"|{'---|' * (14 + len(others))}",
    ]
    for row in rows:
        cells = [
            row.method,
            f"{row.learning_rate:g}, {row.block_learning_rate:g}",
            last(row, measure),
            best(row, measure),
            *(_mean(row, _metric(other), ".4f") for other in others),
            _mean(row, lambda run: run["validation_loss"], ".4f"),
            str(len(row.losses)),
            *(_mean(row, number, form) for number, form in COSTS.values()),
            str(row.tried),
            "; ".join(
                f"{rest:g}, {blocks:g} after step {step}"
                for rest, blocks, step in row.diverged
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def words(name: str) -> str:
    """Returns the name of a metric in words."""
    return name.replace("_", " ")


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


def cost(row: Row, name: str) -> str:
    """Returns the mean of one of the :data:`COSTS`."""
    return _mean(row, *COSTS[name])


def _rank(run: Mapping[str, Any]) -> float | None:
    means = [float(np.mean(ranks)) for ranks in (run["mean_ranks"] or {}).values()]
    return statistics.mean(means) if means else None


# Title of a column -> number of a run, None if it has none; and how it is written.
COSTS: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str]] = {
    "block state": (lambda run: run["block_state_bytes"] / 1e6, ".3f"),
    "whole state": (lambda run: run["optimizer_state_bytes"] / 1e6, ".3f"),
    "rank": (_rank, ".2f"),
    "effective rank": (lambda run: run["effective_rank"], ".2f"),
    "seconds per step": (lambda run: run["step_seconds"], ".3f"),
    "peak": (
        lambda run: run["step_peak_bytes"] and run["step_peak_bytes"] / 1e6,
        ".0f",
    ),
}


def _metric(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: run["last_metrics"][name]


def _mean(
    row: Row, number: Callable[[Mapping[str, Any]], float | None], form: str
) -> str:
    found = [number(run) for run in finished_runs(row)]
    found = [x for x in found if x is not None]
    return format(statistics.mean(found), form) if found else ""


def _spread(numbers: Iterable[float]) -> str:
    found = list(numbers)
    if not np.all(np.isfinite(found)):
        return "diverged"
    if len(found) == 1:
        return f"{found[0]:.4f}"
    return f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
