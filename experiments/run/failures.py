"""What a machine runs out of, told as one line: disk and memory."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jax.errors import JaxRuntimeError

import lowrank_optax
from experiments.distribution.host_memory import DEVICE
from experiments.distribution.rules import memory_plan
from experiments.errors import UserError
from experiments.run.parts import Parts
from experiments.run.plans import on_a_device

_OF_A_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
}


@contextlib.contextmanager
def told_in_a_line(parts: Parts, compiled: Sequence[Any] = ()) -> Iterator[None]:
    """Turns a full disk and memory that is used up into a UserError.

    Args:
        parts: Of the run.
        compiled: Its compiled steps, as soon as there are any.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_A_DISK:
            raise
        raise UserError(
            f"cannot write to --out {parts.directory} ({error.strerror}); make room "
            "there, then continue from the last complete checkpoint with --resume"
        ) from error
    except MemoryError as error:
        raise UserError(out_of_memory(parts, compiled)) from error
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(parts, compiled)) from error


def check_fits(parts: Parts) -> None:
    """Raises UserError if a device cannot hold its share of parameters and state.

    Args:
        parts: Of the run; nothing of it is on a device yet.
    """
    device, memory = parts.mesh.local_devices[0], parts.config.state_memory
    # A CPU's memories are the machine's.
    memory = DEVICE if device.platform == "cpu" else memory
    plan = memory_plan(parts.tx, parts.param_shapes, memory)
    found = on_a_device(plan)
    parameters, state = found.parameters, found.optimizer
    if parts.resumed is not None:
        # Its state may have been compacted since.
        for done in parts.resumed.progress["compaction"]["done"][-1:]:
            state = state * done["bytes_after"] // plan.optimizer_bytes
    has, needed, who = _bytes_of(device), parameters + state, "each device"
    if device.platform == "cpu":
        # Its devices share the memory of the machine.
        count = len(parts.mesh.local_devices)
        needed, who = count * needed, "this machine"
        if count > 1:
            who += f", as {count} devices,"
    if needed <= has:
        return
    sizes = ", ".join(f"{name} {size}" for name, size in parts.mesh.shape.items())
    config = parts.config
    raise UserError(
        f"the run does not fit: on the mesh {sizes}, {who} needs {needed / 1e9:.3f} GB "
        f"for parameters and the state of {config.optimizer}, by the plan, but has "
        f"{has / 1e9:.3f} GB; give a larger fsdp in --mesh, or another --optimizer "
        f"than {config.optimizer}: python -m experiments.plan_memory lists what each "
        "takes"
    )


def out_of_memory(parts: Parts, compiled: Sequence[Any] = ()) -> str:
    """Returns what takes the memory, and which flags take less.

    Args:
        parts: Of the run.
        compiled: Its compiled steps.
    """
    params, _ = parts.abstract_state()
    plan = memory_plan(parts.tx, params, parts.config.state_memory)
    found = on_a_device(plan)
    planned: dict[str, int] = {
        "of parameters": found.parameters,
        "of gradients": found.gradients,
        "of optimizer state": found.optimizer,
    }
    peaks = [_peak(parts, params, step) for step in compiled]
    if peaks:
        planned["at the peak of the compiled step"] = max(peaks)
    sizes = ", ".join(f"{size / 1e9:.3f} GB {what}" for what, size in planned.items())
    device = parts.mesh.local_devices[0]
    config = parts.config
    mends = [
        f"a --batch-size below {config.batch_size}",
        f"--accumulate above {config.accumulate}",
        *([] if config.remat else ["--remat"]),
    ]
    return (
        f"out of memory: the plan has {sizes}, and activations of "
        f"{config.batch_size // config.accumulate} sequences at a time; "
        f"{device.device_kind} has {_bytes_of(device) / 1e9:.3f} GB; give "
        f"{' or '.join(mends)}, or see python -m experiments.plan_memory"
    )


def _peak(parts: Parts, params: Any, step: Any) -> int:
    plan = lowrank_optax.memory_plan(parts.tx, params, step)
    return 0 if plan.compiled is None else plan.compiled["peak"]


def _bytes_of(device: Any) -> int:
    """Returns the bytes that a device has for arrays; of a CPU, the machine's."""
    stats = device.memory_stats() or {}
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit", of_machine)
