"""Prints the tables of runs: ``python -m benchmarks.tuning.tables FILE...``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tuning.records import Record, read
from experiments.comparison.joined import joined_table
from experiments.comparison.rows import rows_of
from experiments.comparison.suites import SUITES
from experiments.comparison.tuning_report import tuning_table


def text(records: Sequence[Record]) -> str:
    """Returns the tables of some records in Markdown, a part for each suite."""
    parts = []
    for name in dict.fromkeys(record["suite"] for record in records):
        suite = SUITES[name]
        tasks: dict[str, list[Record]] = {}
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
    print(text(read(parser.parse_args().files)), end="")


if __name__ == "__main__":
    main()
