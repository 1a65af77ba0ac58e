"""The command; see the package."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.together.jobs import done, jobs_of, start_worker
from experiments.comparison.outcome import commit_of_code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together")
    parser.add_argument("--suites", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
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
    options.deadline = time.monotonic() + 60 * options.minutes
    work = [(options, job) for job in jobs_of(options)]
    context = multiprocessing.get_context("spawn")
    # A worker of its own process: each starts JAX anew, and takes memory as it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Ends the workers too: without it they would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with context.Pool(options.workers, start_worker, (context.Lock(),)) as pool:
        for line in pool.imap_unordered(done, work, chunksize=1):
            left = options.deadline - time.monotonic()
            print(f"{left:5.0f} s left: {line}", flush=True)


if __name__ == "__main__":
    main()
