"""The processes of a comparison: one a run, each with its share of the cores."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# glibc keeps what is freed: a fifth of a small model's step on a CPU goes into giving
# pages back and taking them again.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


class Processes:
    """Runs of ``pretrain_llama``, some of them at a time.

    Args:
        jobs: So many at a time; on CPUs each has its share of the cores.
        held: Descriptor that keeps the directory of the comparison.

    Attributes:
        stopped: Whether they have been told to end; no more are started then.
    """

    def __init__(self, jobs: int, held: int):
        self._jobs, self._held = jobs, held
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._slots = 0
        self.stopped = False

    def take_cores(self) -> None:
        """Gives this thread's processes, which inherit them, a share of the cores."""
        jobs = self._jobs
        if jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return
        with self._lock:
            slot, self._slots = self._slots, self._slots + 1
        cores = sorted(os.sched_getaffinity(os.getpid()))
        mine = cores[slot::jobs] or [cores[slot % len(cores)]]
        os.sched_setaffinity(0, mine)

    def stop(self) -> None:
        """Ends the runs under way, each with a checkpoint."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def run(self, flags: list[str], log: Path) -> int:
        """Waits for a run to end; returns its exit status.

        Args:
            flags: Of ``pretrain_llama``.
            log: Where it writes what it says.

        Raises:
            CancelledError: If the comparison has been stopped.
        """
        command = [sys.executable, "-m", "experiments.pretrain_llama", *flags]
        with log.open("w") as file:
            with self._lock:
                if self.stopped:
                    raise concurrent.futures.CancelledError
                # In a session of its own: Ctrl-C reaches it once, from here.
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    # Should this process die, the run keeps the directory.
                    pass_fds=[self._held],
                    env={**_KEEP_PAGES, **os.environ},
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
