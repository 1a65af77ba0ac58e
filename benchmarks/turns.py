"""Jobs in worker processes that use one accelerator by turns."""

import argparse
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

# Held by the worker that uses the accelerator; set in each worker.
_turn: AbstractContextManager[Any] = contextlib.nullcontext()


def turn() -> AbstractContextManager[Any]:
    """Returns what a worker holds while it uses the accelerator."""
    return _turn


def run(
    do: Callable[[argparse.Namespace, Any], str],
    options: argparse.Namespace,
    jobs: Sequence[tuple[str, ...]],
) -> None:
    """Does all jobs in worker processes, and prints a line for each.

    Args:
        do: Function of a module, (options, job) -> what came of the job, in a line.
        options: ``workers``, their number, and ``minutes``, after which no job starts;
            ``deadline``, the time of ``time.monotonic`` then, is added.
        jobs: The most important first.
    """
    options.deadline = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    # A worker of its own process: each starts JAX anew, and takes memory as it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Ends the workers too: without it they would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with context.Pool(options.workers, _start, (context.Lock(),)) as pool:
        told = functools.partial(_told, do, options)
        for line in pool.imap_unordered(told, jobs, chunksize=1):
            left = options.deadline - time.monotonic()
            print(f"{left:5.0f} s left: {line}", flush=True)


def _start(given: AbstractContextManager[Any]) -> None:
    global _turn
    _turn = given


def _told(do, options: argparse.Namespace, job: tuple[str, ...]) -> str:
    started, name = time.monotonic(), " ".join(job)
    if started > options.deadline:
        return f"{name}: no time was left"
    try:
        said = do(options, job)
    except Exception as error:
        text = traceback.format_exc(limit=-3)
        return f"{name}: {type(error).__name__}: {str(error)[:300]}\n{text}"
    return f"{name}: {said}, {time.monotonic() - started:.0f} s"
