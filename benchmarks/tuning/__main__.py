"""The command; see the package."""

import argparse
from pathlib import Path

from benchmarks import turns
from benchmarks.tuning.jobs import jobs_of, trained
from experiments.comparison.outcome import commit_of_code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning")
    parser.add_argument("--suites", nargs="+", default=["glue-small"])
    parser.add_argument("--parts", nargs="+", help="tasks of suites that have several")
    parser.add_argument("--only", nargs="+", help="methods, the most important first")
    parser.add_argument("--data", nargs="+", required=True, help="one for each suite")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument(
        "--known",
        nargs="+",
        type=Path,
        help="files of earlier runs, which are not run again",
    )
    parser.add_argument("--steps", type=int, help="in the place of the suites'")
    parser.add_argument("--search", type=int, help="runs of a search, likewise")
    parser.add_argument("--seeds", type=int, help="their number, likewise")
    parser.add_argument(
        "--rates", type=float, nargs=2, help="of rest and blocks; no search"
    )
    parser.add_argument("--model", help="in the place of the suites'")
    parser.add_argument("--minutes", type=float, default=8, help="to end within")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commit", help="to record; else git is asked")
    options = parser.parse_args()
    options.commit = options.commit or commit_of_code()
    turns.run(trained, options, jobs_of(options))


if __name__ == "__main__":
    main()
