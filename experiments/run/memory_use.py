"""The memory that a run has in use, measured."""

import dataclasses
import re
import sys
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory in use now, and at its peak since the process started.

    Attributes:
        in_use: Bytes; None: not known.
        peak: Bytes; None: not known.
        source: What was asked: "device", the allocator of the fullest device; or
            "process", the resident memory of the process, which has Python, the
            compiler and the text in it too.
    """

    in_use: int | None
    peak: int | None
    source: str


def memory_use() -> MemoryUse:
    """Measures; on a CPU, whose device does not count, the process.

    What runs on the device is not waited for.
    """
    devices = jax.local_devices()
    found = [device.memory_stats() or {} for device in devices]
    if all("peak_bytes_in_use" in stats for stats in found):
        return MemoryUse(
            max(stats["bytes_in_use"] for stats in found),
            max(stats["peak_bytes_in_use"] for stats in found),
            "device",
        )
    if devices[0].platform != "cpu":
        return MemoryUse(None, None, "device")
    return _of_process()


def _of_process():
    if _STATUS.exists():
        kib = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", _STATUS.read_text()))
        if len(kib) == 2:
            now, peak = (1024 * int(kib[name]) for name in ("VmRSS", "VmHWM"))
            return MemoryUse(now, peak, "process")
    import resource  # Of Unix alone.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return MemoryUse(None, peak if sys.platform == "darwin" else 1024 * peak, "process")
