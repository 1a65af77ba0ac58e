"""What a run waits for, told where it takes long: nothing hangs in silence."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from experiments.distribution.processes import index, is_first

_SECONDS = 30.0


class Waits:
    """Says what is waited for after half a minute, after one, two, four ...

    A context manager, with a thread of its own.

    Args:
        say: Called with a line, on that thread.
        seconds: Until the first line.
    """

    def __init__(self, say: Callable[[str], None], seconds: float = _SECONDS):
        self._say, self._seconds = say, seconds
        self._waiting: tuple[str, float] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Waits":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._is_over.set()
        self._thread.join()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Says so if what is done inside takes long.

        Args:
            what: What is waited for, in words.
        """
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def _run(self) -> None:
        told_at, told = 0.0, 0.0
        while not self._is_over.wait(self._seconds / 30):
            waiting = self._waiting
            if waiting is None:
                continue
            what, since = waiting
            if since != told_at:
                told_at, told = since, self._seconds / 2
            seconds = time.monotonic() - since
            if seconds >= 2 * told:
                told = seconds
                self._say(f"waiting for {what}, for {seconds:.0f} s now")


def teller(say: Callable[[str], None]) -> Callable[[str], None]:
    """Returns what says a line of this process: others than the first name themselves.

    Args:
        say: Of the first process.
    """
    if is_first():
        return say
    return lambda text: print(f"process {index()}: {text}", file=sys.stderr, flush=True)
