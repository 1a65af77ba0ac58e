"""What a machine runs out of, told as one line: disk and memory."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from jax.errors import JaxRuntimeError

import lowrank_optax
from experiments.errors import UserError
from experiments.run.assemble import Parts

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
def told_in_a_line(parts: Parts) -> Iterator[None]:
    """Turns a full disk and memory that is used up into a UserError.

    Args:
        parts: Of the run.
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
        raise UserError(out_of_memory(parts)) from error
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(parts)) from error


def out_of_memory(parts: Parts) -> str:
    """Returns what takes the memory, and which flags take less."""
    params, _ = parts.abstract_state()
    plan = lowrank_optax.memory_plan(parts.tx, params)
    planned = {
        "parameters": plan.parameter_bytes,
        "gradients": plan.gradient_bytes,
        "the optimizer's state": plan.optimizer_bytes,
    }
    device = parts.mesh.devices.flat[0]
    least = sum(planned.values())
    config = parts.config
    micro_batch = config.batch_size // config.accumulate
    mends = [
        f"a --batch-size below {config.batch_size}",
        f"--accumulate above {config.accumulate}",
        *([] if config.remat else ["--remat"]),
    ]
    return (
        f"out of memory: the plan is {', '.join(map(_in_gb, planned.items()))}, "
        f"{least / 1e9:.3f} GB in all, and the activations of {micro_batch} sequences "
        f"beside them; {device.device_kind} has {_bytes_of(device) / 1e9:.3f} GB; give "
        f"{' or '.join(mends)}, or see python -m experiments.plan_memory"
    )


def _in_gb(planned: tuple[str, Any]) -> str:
    name, size = planned
    return f"{size / 1e9:.3f} GB of {name}"


def _bytes_of(device: Any) -> int:
    """Returns the bytes that a device has for arrays; of a CPU, the machine's."""
    stats = device.memory_stats() or {}
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit", of_machine)
