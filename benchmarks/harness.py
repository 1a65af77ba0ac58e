"""Runs alternatives side by side, and writes results with device and versions."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

RESULTS = Path(__file__).parent / "results"


def parse_no_flags(about: str | None) -> None:
    """Ends a command that has no flags where ``--help``, or any other, is given.

    Args:
        about: What the command does, for the help.
    """
    argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()


def seconds(prepare: Callable[[], Callable[[], Any]]) -> float:
    """Returns the wall time of the call that ``prepare`` returns, until its result.

    The preparation, of a state to donate for instance, is not timed.
    """
    function = prepare()
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def compiled_update(
    tx: optax.GradientTransformation, gradients: Any, *params: Any, **static: Any
) -> tuple[Callable[..., Any], Any, float]:
    """Returns the compiled update, a state for it, and the seconds of compilation.

    The state is donated, as in a training loop. Without ``params`` the gradients give
    ``init`` its shapes. ``static`` is passed to ``update``, for instance
    ``refresh=False``.
    """
    state = tx.init(*params or (gradients,))
    start = time.perf_counter()
    # A new function, because JAX caches compiled functions.
    jitted = jax.jit(lambda *args: tx.update(*args, **static), donate_argnums=1)
    compiled = jitted.lower(gradients, state, *params).compile()
    return compiled, state, time.perf_counter() - start


def paired(
    ours: Callable[[], Callable[[], Any]],
    theirs: Callable[[], Callable[[], Any]],
    rounds: int,
) -> dict[str, Any]:
    """Times both in turns, so that a busy machine is busy for both.

    Args:
        ours: See :func:`seconds`.
        theirs: See :func:`seconds`.
        rounds: Pairs.

    Returns:
        Seconds of each round and, pair by pair, ours / theirs: median, least, most.
    """
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return {
        "ours_seconds": [a for a, _ in pairs],
        "theirs_seconds": [b for _, b in pairs],
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def environment() -> dict[str, str]:
    """Returns versions, device, commit and date."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
    ).stdout.strip()
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": f"{device.platform}: {device.device_kind}",
        "cores": str(_cores()),
        "openblas_threads": os.environ["OPENBLAS_NUM_THREADS"],
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def save(name: str, measurements: dict[str, Any]) -> None:
    """Writes ``results/<name>-<platform>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{jax.devices()[0].platform}.json"
    record = {"environment": environment(), "measurements": measurements}
    path.write_text(json.dumps(record, indent=1) + "\n")


def write(name: str, measurements: dict[str, Any]) -> None:
    """Saves pairs and prints their ratios."""
    save(name, measurements)
    for label, result in measurements.items():
        print(f"{name} {label}: {_summary(result)}")


def _summary(result: dict[str, Any]) -> str:
    text = (
        f"ours / theirs {result['ratio_median']:.4f} "
        f"({result['ratio_min']:.4f} to {result['ratio_max']:.4f}), "
        f"ours {statistics.median(result['ours_seconds']):.3f} s, "
        f"theirs {statistics.median(result['theirs_seconds']):.3f} s"
    )
    compile_times = result.get("compile_seconds", {})
    for who, value in compile_times.items():
        text += f", compile {who} {value:.2f} s"
    return text
