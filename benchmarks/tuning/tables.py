"""Prints the tables of runs: ``python -m benchmarks.tuning.tables FILE...``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.joined import joined_table
from experiments.comparison.rows import rows_of
from experiments.comparison.suites import SUITES
from experiments.comparison.tuning_report import tuning_table
from experiments.run.files import read_lines


def text(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tables of some records in Markdown, a part for each suite."""
    parts = []
    for name in dict.fromkeys(record["suite"] for record in records):
        suite = SUITES[name]
        tasks: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            if record["suite"] == name:
                tasks.setdefault(record["part"], []).append(record)
        if suite.tasks:
            parts.append(joined_table(name, suite, tasks))
        else:
            rows = rows_of(tasks[""], suite.measure)
            parts.append(f"# {name}\n\n{tuning_table(rows, suite.measure)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.tables")
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    print(text([x for path in files for x in read_lines(path)]), end="")


if __name__ == "__main__":
    main()
