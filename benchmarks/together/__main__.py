"""The command; see the package."""

import argparse
from pathlib import Path

from benchmarks import turns
from benchmarks.together.jobs import jobs_of, searched
from experiments.comparison.outcome import commit_of_code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together")
    parser.add_argument("--suites", nargs="+", required=True)
    parser.add_argument(
        "--texts", nargs="+", type=Path, required=True, help="one for each suite"
    )
    parser.add_argument("--only", nargs="+", help="methods, the most important first")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument(
        "--known", nargs="+", type=Path, default=[], help="files of earlier runs"
    )
    parser.add_argument(
        "--candidates", type=Path, help="JSON: more methods, by their fields"
    )
    parser.add_argument("--width", type=int, default=9, help="runs of a program")
    parser.add_argument("--steps", type=int, help="in the place of the suites'")
    parser.add_argument("--minutes", type=float, default=8, help="to end within")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commit", help="to record; else git is asked")
    options = parser.parse_args()
    options.commit = options.commit or commit_of_code()
    if len(options.texts) != len(options.suites):
        parser.error("--texts needs a file for each of --suites, in their order")
    try:
        jobs = jobs_of(options)
    except ValueError as error:
        parser.error(str(error))
    turns.run(searched, options, jobs)


if __name__ == "__main__":
    main()
