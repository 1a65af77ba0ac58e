"""Worker processes: each starts JAX, measures some units, writes results and ends."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from benchmarks.accelerator import records
from benchmarks.accelerator.units import Unit

ROOT = Path(__file__).parents[2]
GRACE = 10  # seconds for a worker after its own deadline


def run(
    units: Sequence[Unit], out: Path, seconds: float, cache: Path, is_smoke: bool
) -> None:
    """Measures units of one stage in a process of their own, and waits for the process.

    Afterwards each unit has a result, an error, or a reason why it was skipped, even if
    the process has crashed.

    Args:
        units: Units of one stage.
        out: Directory of the files.
        seconds: Time limit for all units.
        cache: Directory of tuned kernels, which stages b and d share.
        is_smoke: Whether the units are toys.
    """
    stage = units[0].stage
    command = [sys.executable, "-m", "benchmarks.accelerator"]
    command += ["--out", str(out.resolve()), "--worker", stage]
    command += ["--seconds", f"{seconds:.0f}", "--units", *(x.name for x in units)]
    if is_smoke:
        command.append("--smoke")
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(
                command,
                stdout=errors,
                stderr=errors,
                cwd=ROOT,
                env=_environment(units[0], cache, is_smoke),
                timeout=seconds + GRACE,
            ).returncode
            reason = f"the process ended with status {code}"
        except subprocess.TimeoutExpired:
            reason = f"the process was ended after {seconds + GRACE:.0f} s"
        errors.seek(0)
        printed = errors.read()[-600:].strip()
    error = f"{reason}: {printed.rpartition(chr(10))[-1]}\n{printed}"
    measured = records.load(out, stage)["measurements"]
    for unit in units:
        if not records.has_ended(measured.get(unit.name, {})):
            records.add(out, stage, unit.name, {"error": error})


def measure(units: Sequence[Unit], out: Path, seconds: float, is_smoke: bool) -> None:
    """Measures units of one stage in this process.

    Raises:
        RuntimeError: If JAX has only a CPU, and the units are not toys.
    """
    end = time.monotonic() + seconds
    device = jax.devices()[0]
    if device.platform == "cpu" and not is_smoke:
        raise RuntimeError("JAX has no accelerator here; see --smoke.")
    stage = units[0].stage
    records.add_device(out, stage, f"{device.platform}: {device.device_kind}")
    for i, unit in enumerate(units):
        left = end - time.monotonic()
        if left < unit.least / 2:
            reason = {"skipped": f"{left:.0f} s were left in its process"}
            records.add(out, stage, unit.name, reason)
            continue

        def write(result, name=unit.name):
            records.add(out, stage, name, result)

        try:
            unit.measure(write, time.monotonic() + left / (len(units) - i))
            write({"finished": True})
        except Exception as error:
            write({"error": records.text_of(error)})


def _environment(unit: Unit, cache: Path, is_smoke: bool) -> Mapping[str, str]:
    """Returns the environment variables of a worker, which JAX reads at its start."""
    variables = dict(os.environ, PYTHONUNBUFFERED="1")
    if is_smoke:
        # Toys spend their time on compilation.
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    elif unit.stage in "bd":
        variables["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    if unit.byte_limit is None:
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    else:
        # Allocated in one piece at the start, as on a card of this size.
        fraction = unit.byte_limit / _bytes_of_device()
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(fraction, 0.9):.4f}"
    return variables


def _bytes_of_device() -> int:
    """Returns the memory of the first NVIDIA device, or of an H100 if none is found."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return 81_559 * 2**20
