"""The processes of a comparison: one a run, each with its share of the cores."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# glibc keeps freed memory. Otherwise a small model's step on a CPU spends a fifth of
# its time on returning pages and taking them again.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


class Processes:
    """Runs of a training command, several at a time.

    Args:
        jobs: Number of runs at a time; on CPUs each has its share of the cores.
        held: Descriptor of the lock on the comparison's directory.
        program: Module of the command.

    Attributes:
        stopped: Whether the runs have been told to end; no run starts after that.
    """

    def __init__(self, jobs: int, held: int, program: str):
        self._jobs, self._held, self._program = jobs, held, program
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._slots = 0
        self.stopped = False

    def take_cores(self) -> None:
        """Gives this thread a share of the cores; its child processes inherit it."""
        jobs = self._jobs
        if jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return
        with self._lock:
            slot, self._slots = self._slots, self._slots + 1
        cores = sorted(os.sched_getaffinity(os.getpid()))
        mine = cores[slot::jobs] or [cores[slot % len(cores)]]
        os.sched_setaffinity(0, mine)

    def stop(self) -> None:
        """Ends the current runs, each with a checkpoint."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def run(self, flags: list[str], log: Path) -> int:
        """Waits for a run to end; returns its exit status.

        Args:
            flags: Flags of the command.
            log: File for the output of the run.

        Raises:
            CancelledError: If the comparison has been stopped.
        """
        command = [sys.executable, "-m", self._program, *flags]
        with log.open("w") as file:
            with self._lock:
                if self.stopped:
                    raise concurrent.futures.CancelledError
                # In a session of its own, where Ctrl-C reaches the run once, from here.
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    # If this process dies, the run keeps the lock on the directory.
                    pass_fds=[self._held],
                    env={**_KEEP_PAGES, **os.environ},
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
