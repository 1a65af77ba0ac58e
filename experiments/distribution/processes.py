"""The processes of a run: how they come together, and what they tell each other.

JAX's runtime joins them, and its key-value store carries the words. Everything here
also works in a run of one process, which joins nothing.
"""

import functools
import socket
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from orbax.checkpoint import multihost

from experiments.errors import UserError

# What one process waits for the words of the others: their end is noticed otherwise.
_LONG_MS = 24 * 60 * 60 * 1000
AUTOMATIC = "auto"


def join(
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
    timeout: float,
) -> None:
    """Joins this process to the others; before anything else is asked of JAX.

    Args:
        coordinator: ``HOST:PORT`` of process 0, which listens there; or ``auto``: what
            JAX detects of SLURM, Open MPI, Kubernetes or Cloud TPU.
        num_processes: Their number; None: detected.
        process_id: Number of this one, from 0 on; None: detected.
        timeout: Seconds to wait for the others.

    Raises:
        UserError: If the coordinator or some of the processes do not come.
    """
    # A process that dies would otherwise abort the others, with a page of text. Who
    # watches instead: experiments.distribution.watch.
    jax.config.update("jax_enable_recoverability", True)
    # Its handler of SIGTERM would take the place of the run's own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    is_named = coordinator != AUTOMATIC
    if is_named and process_id != 0:
        _knock(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator if is_named else None,
            num_processes,
            process_id,
            initialization_timeout=max(1, round(timeout)),
            # Not sooner than the watch.
            heartbeat_timeout_seconds=max(100, round(4 * timeout)),
        )
    except (JaxRuntimeError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if not is_named:
            raise UserError(
                f"--coordinator auto: JAX detects no processes here ({first}); give "
                "--coordinator HOST:PORT, --num-processes and --process-id"
            ) from error
        if "Address already in use" in str(error):
            raise UserError(
                f"--coordinator {coordinator} is in use by another program; choose "
                "another port"
            ) from error
        raise UserError(
            f"--coordinator {coordinator}: not all of --num-processes {num_processes} "
            f"came within {timeout:g} s ({first}); start each with its own "
            "--process-id, or give a larger --process-timeout"
        ) from error


def host_of(coordinator: str) -> str | None:
    """Returns the host of process 0 as the others have reached it; None: detected."""
    if coordinator == AUTOMATIC:
        return None
    return coordinator.rpartition(":")[0].strip("[]")


def _knock(coordinator: str, timeout: float) -> None:
    """Waits until someone listens."""
    host, port = host_of(coordinator) or "", coordinator.rpartition(":")[2]
    ends = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > ends:
                reason = error.strerror or str(error)
                raise UserError(
                    f"--coordinator {coordinator} has not answered for {timeout:g} s "
                    f"({reason}); start process 0 there, or give its address"
                ) from error
        time.sleep(0.2)


def is_joined() -> bool:
    """Returns whether this process has been joined to others."""
    return jax.distributed.is_initialized()


def count() -> int:
    """Returns how many processes there are."""
    return jax.process_count()


def index() -> int:
    """Returns the number of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Returns whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def store() -> Any:
    """Returns the key-value store of the runtime; there is more than one process."""
    return multihost.get_jax_distributed_client()


def of_all(name: str, value: str) -> list[str]:
    """Returns the values of all processes, in their order; all call it.

    Args:
        name: Not used before.
        value: Of this process.
    """
    if count() == 1:
        return [value]
    store().key_value_set(f"lowrank/{name}/{index()}", value)
    get = functools.partial(store().blocking_key_value_get, timeout_in_ms=_LONG_MS)
    return [get(f"lowrank/{name}/{i}") for i in range(count())]


def of_first(name: str, value: str) -> str:
    """Returns the value of the first process; all call it.

    Args:
        name: Not used before.
        value: Of this process; that of the first counts.
    """
    if count() == 1:
        return value
    if is_first():
        store().key_value_set(f"lowrank/{name}", value)
        return value
    return store().blocking_key_value_get(f"lowrank/{name}", timeout_in_ms=_LONG_MS)


def wait_for_all(name: str) -> None:
    """Waits until all processes are here.

    Args:
        name: Of the place, not used before.
    """
    if count() > 1:
        store().wait_at_barrier(f"lowrank/{name}", timeout_in_ms=_LONG_MS)
