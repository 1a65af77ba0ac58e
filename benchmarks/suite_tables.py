"""Tables of the comparisons that pre-train, from their results.jsonl."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.comparison.flags import present, settings_of
from experiments.comparison.rows import Row, rows_of
from experiments.comparison.search import untried
from experiments.comparison.suites import SUITES

RESULTS = Path(__file__).resolve().parent / "results"

Rows = Iterator[list[str]]


def rows(suite: str) -> list[Row]:
    """Returns a row for each method of a suite, of runs with its present settings.

    A method whose search has not ended is left out.

    Args:
        suite: Name of the suite, and of its folder in ``benchmarks/results``.

    Raises:
        ValueError: If the results are of other settings of the suite.
    """
    text = (RESULTS / suite / "results.jsonl").read_text("utf-8")
    of_suite = SUITES[suite]
    if _definition(suite)["flags"] != of_suite.flags:
        raise ValueError(f"the results of {suite} are of other flags of the suite.")
    records = present(map(json.loads, text.splitlines()), settings_of(of_suite))
    least = len(of_suite.seeds) if _is_searched(suite) else 1
    return [row for row in rows_of(records) if len(row.losses) >= least]


def _is_searched(suite: str) -> bool:
    """Returns whether the methods of a suite searched, or took rates from elsewhere."""
    return _definition(suite)["rates_from"] is None


def _definition(suite: str) -> dict[str, Any]:
    """Returns the settings that all results of a suite share."""
    return json.loads((RESULTS / suite / "suite.json").read_text("utf-8"))


def table(suite: str) -> Rows:
    """Yields the rows of a suite, by rising loss."""
    yield [
        *("method", "rates: rest, blocks", "loss, each seed", "mean", "to AdamW"),
        *("to Muon", "block state", "whole state", "runs", "neighbours not tried"),
    ]
    found = rows(suite)
    like = {c.name: c.like for c in SUITES[suite].contenders}
    is_searched = _is_searched(suite)
    means = {row.method: row.mean for row in found}
    for row in found:
        # The others have the rates of another method.
        searched = is_searched and like[row.method] not in like
        best = row.learning_rate, row.block_learning_rate
        yield [
            f"`{row.method}`",
            row.rates,
            ", ".join(f"{loss:.4f}" for loss in row.losses),
            f"{row.mean:.4f}",
            *(_to(means.get(name), row.mean) for name in ("adamw", "muon")),
            f"{row.block_share:.3f}",
            f"{row.share:.3f}",
            str(row.tried),
            str(len(untried(best, row.searched))) if searched else "",
        ]


def _to(other: float | None, mean: float) -> str:
    return "" if other is None else f"{100 * (mean / other - 1):+.1f} %"


def names(*suites: str) -> dict[str, Callable[[], Rows]]:
    """Returns the tables of suites whose results are there."""
    there = (s for s in suites if (RESULTS / s / "results.jsonl").exists())
    return {suite: functools.partial(table, suite) for suite in there}


TABLES = names("cpu-small", "cpu-long", "cpu-wide")
