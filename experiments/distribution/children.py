"""The processes of a run on one machine: started, heard, told and ended together."""

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

# What is passed on, and as what: a lost terminal must not end a run without saving.
_SIGNALS = {
    getattr(signal, name): passed
    for name, passed in {
        "SIGINT": signal.SIGINT,
        "SIGTERM": signal.SIGTERM,
        "SIGHUP": signal.SIGTERM,
    }.items()
    if hasattr(signal, name)
}
# Gloo's list of its peers, what absl and XLA log, and the frames of a stack: not what
# is logged as fatal.
_NOISE = re.compile(
    r"\[Gloo\] Rank|[EIW]\d{4} \d\d:\d\d:\d\d|\d{4}-\d\d-\d\d [\d:.]+: [EIW] "
    r"|WARNING: All log messages before absl|\s+@ |\*\*\* Check failure stack trace"
)
_INTERVAL = 0.1  # seconds between two looks at the processes
_SECONDS_TO_TERMINATE = 10.0
_PR_SET_PDEATHSIG = 1


def run_together(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    seconds: float,
    verbose: bool = False,
) -> int:
    """Runs a command in each of several processes; returns an exit status.

    The first one has the terminal of this process. Of the others the lines on stderr
    come with their number, without the noise of libraries; stdout is dropped. SIGINT,
    SIGTERM and SIGHUP reach each process once; SIGHUP as SIGTERM. No process outlives
    this one: if it is killed, on Linux they get SIGTERM.

    Args:
        commands: The words of each.
        environments: Of each, whole.
        seconds: From the end of the first that ends on, until the others are ended.
        verbose: Shows stdout and noise of the others too.

    Returns:
        That of the first process to fail; 128 + N if signal N ended it; 0 if none did.
    """
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    with _heard() as signals:
        try:
            # All before the first thread: a process with threads is not to be forked.
            for words, environment in zip(commands, environments, strict=True):
                is_first = not processes
                processes.append(_started(words, environment, is_first, verbose))
            for index, process in enumerate(processes):
                reader = threading.Thread(
                    target=_show, args=(index, process, verbose), daemon=True
                )
                reader.start()
                readers.append(reader)
            ended = _wait(processes, signals, seconds)
        finally:
            _kill(processes)
    for reader in readers:
        # A process of theirs may have the other end of the pipe.
        reader.join(timeout=2)
    # In the order of their ends; what was killed here comes last.
    ended += [process for process in processes if process not in ended]
    codes = (process.returncode for process in ended)
    statuses = (code if code >= 0 else 128 - code for code in codes)
    return next(filter(None, statuses), 0)


@contextlib.contextmanager
def _heard() -> Iterator[collections.deque[int]]:
    """Collects the signals of this process, but for those that it is to ignore."""
    found: collections.deque[int] = collections.deque()
    old = {
        number: signal.signal(number, lambda number, _: found.append(number))
        for number in _SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield found
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _started(words, environment, is_first: bool, verbose: bool) -> subprocess.Popen:
    stdout = stderr = None
    if not is_first:
        stdout = subprocess.PIPE if verbose else subprocess.DEVNULL
        stderr = subprocess.STDOUT if verbose else subprocess.PIPE
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        encoding="utf-8",
        errors="replace",
        # Ctrl-C in a terminal would reach it twice, the second time from here.
        start_new_session=True,
        preexec_fn=_end_with_parent(),
    )


def _end_with_parent() -> Callable[[], None] | None:
    """Returns what a process does at its start, for the system to end it with us."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def begin():
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return begin


def _show(index: int, process: subprocess.Popen, verbose: bool) -> None:
    for line in process.stdout or process.stderr or ():
        if verbose or not _NOISE.match(line):
            with contextlib.suppress(OSError):
                _say(f"[process {index}] {line.rstrip()}")


def _say(line: str) -> None:
    # At once: threads would mix what print writes in two parts.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _wait(
    processes: Sequence[subprocess.Popen],
    signals: collections.deque[int],
    seconds: float,
) -> list[subprocess.Popen]:
    """Waits for all, and passes signals on; returns those that ended, in this order."""
    first_end, ended = None, []
    while running := [p for p in processes if p.poll() is None]:
        ended += [p for p in processes if p not in running and p not in ended]
        while signals:
            number = _SIGNALS[signals.popleft()]
            for process in running:
                process.send_signal(number)
        if first_end is None and len(running) < len(processes):
            first_end = time.monotonic()
        if first_end is not None and time.monotonic() - first_end > seconds:
            left = " and ".join(str(processes.index(p)) for p in running)
            _say(
                f"error: {seconds:g} s after the end of another process, process "
                f"{left} of {len(processes)} goes on; it is ended"
            )
            _terminate(running)
            return ended
        time.sleep(_INTERVAL)
    return ended


def _terminate(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    ends = time.monotonic() + _SECONDS_TO_TERMINATE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, ends - time.monotonic()))


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    """Kills what is left, with the processes that it has started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
