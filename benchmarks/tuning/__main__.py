"""The command; see the package."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.tuning.jobs import done, jobs_of, start_worker
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
    options.deadline = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    # A worker of its own process: each starts JAX anew, and takes memory as it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Ends the workers too: without it they would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    turn = context.Lock()
    with context.Pool(options.workers, start_worker, (turn,)) as pool:
        work = [(options, job) for job in jobs_of(options)]
        for line in pool.imap_unordered(done, work, chunksize=1):
            left = options.deadline - time.monotonic()
            print(f"{left:5.0f} s left: {line}", flush=True)


if __name__ == "__main__":
    main()
