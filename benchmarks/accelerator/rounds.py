"""Times programs in turns, so that disturbances of the machine are the same for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Step = Callable[[], Any]

_BATCH = 0.05  # seconds of calls between two waits, at least
_ROUNDS = 15  # at most


def seconds_of(step: Step, calls: int = 1) -> float:
    """Returns the seconds of a call, from ``calls`` calls that are awaited together."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = step()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def in_turns(steps: Mapping[str, Step], seconds: float) -> dict[str, dict[str, Any]]:
    """Times every step in rounds, each step once per round.

    Args:
        steps: Name -> function that makes the next call and returns its result. All
            functions must have run once.
        seconds: Time for all steps together. Three rounds are made in any case.

    Returns:
        Name -> milliseconds of a call: median, min, max; and the number of timed calls.
    """
    calls = {}
    for name, step in steps.items():
        calls[name] = max(1, min(50, round(_BATCH / seconds_of(step))))
    found: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + seconds
    for count in range(_ROUNDS):
        if count >= 3 and time.monotonic() > end:
            break
        for name, step in steps.items():
            found[name].append(seconds_of(step, calls[name]))
    return {name: summary(found[name], calls[name]) for name in steps}


def summary(seconds: list[float], calls: int = 1) -> dict[str, Any]:
    """Returns milliseconds of a call from the seconds of each batch of calls."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
        "batches": len(seconds),
        "calls_per_batch": calls,
    }
