"""What a machine runs out of, told as one line: disk and memory."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jax.errors import JaxRuntimeError

import lowrank_optax
from experiments.errors import UserError
from experiments.run.parts import Parts

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


def out_of_memory(parts: Parts, compiled: Sequence[Any] = ()) -> str:
    """Returns what takes the memory, and which flags take less.

    Args:
        parts: Of the run.
        compiled: Its compiled steps.
    """
    params, _ = parts.abstract_state()
    plan = lowrank_optax.memory_plan(parts.tx, params)
    planned = {
        "of parameters": plan.parameter_bytes,
        "of gradients": plan.gradient_bytes,
        "of optimizer state": plan.optimizer_bytes,
    }
    peaks = [_peak(parts, params, step) for step in compiled]
    if peaks:
        planned["at the peak of the compiled step"] = max(peaks)
    sizes = ", ".join(f"{size / 1e9:.3f} GB {what}" for what, size in planned.items())
    device = parts.mesh.devices.flat[0]
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
