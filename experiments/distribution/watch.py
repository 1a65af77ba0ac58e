"""Who notices that a process of a run has ended: the others, each in one line.

A collective of a dead process is waited for without end, or ends in an error that does
not say why. Each process therefore says at intervals that it lives. The first process
listens, and tells the others what it has found out.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.errors import JaxRuntimeError

from experiments.distribution import processes
from experiments.distribution.connections import Connections

_ALIVE, _ENDED, _LEFT, _VERDICT = (
    f"lowrank/{name}" for name in ("alive", "ended", "left", "verdict")
)
FAILED = 1
_LAST = 10  # seconds that the first process waits for the others' ends, at most


class Watch:
    """Watches over the processes of a run, on threads of its own.

    The death of a process closes its connection, which the others notice at once. A
    process, or a network, that hangs is noticed by the missing signs of life.

    Args:
        timeout: Seconds without a sign of life after which a process counts as dead.
        advice: Told at the end of the line.
        host: Where the first process is; None: at the name that it gives itself.
        end: Ends this process; called with the line.
    """

    def __init__(
        self,
        timeout: float,
        advice: str,
        host: str | None = None,
        end: Callable[[str], None] | None = None,
    ):
        self._timeout, self._advice = timeout, advice
        self._interval = min(2.0, timeout / 5)
        self._end = end or _end
        self._store: Any = processes.store()
        self._seen: dict[str, tuple[str, float]] = {}
        self._is_over = threading.Event()
        self._ending = threading.Lock()
        self._connections = Connections(self._lost, host)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def explain(self) -> None:
        """Waits until it is known which process has ended: this one ends then.

        After an error that may be the echo of another one's end. It returns if all
        processes live.
        """
        self._thread.join(self._timeout + 3 * self._interval)

    def close(self) -> None:
        """Ends the watch, where all processes have reached the end."""
        self._is_over.set()
        self._connections.close()
        self._thread.join()
        self._take_leave()

    def _take_leave(self) -> None:
        """Lets the first process, which has the store, be the last one to go."""
        names = [f"{_LEFT}/{i}" for i in range(1, processes.count())]
        if not processes.is_first():
            self._store.key_value_set(names[processes.index() - 1], "")
            return
        for name in names:
            with contextlib.suppress(JaxRuntimeError):
                self._store.blocking_key_value_get(name, timeout_in_ms=1000 * _LAST)
        self._connections.await_ends(_LAST)

    def tell(self, error: BaseException) -> None:
        """Tells the others why this process ends, and lets them hear of it."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self._is_over.set()
        with contextlib.suppress(JaxRuntimeError):
            if processes.is_first():
                self._tell_all(_told(0, lines[0][:500]))
            else:
                key = f"{_ENDED}/{processes.index()}"
                self._store.key_value_set(key, lines[0][:500], allow_overwrite=True)

    def _lost(self, index: int) -> None:
        """The connection to a process is closed."""
        if self._is_over.is_set():
            return
        verdict = f"process {index} of {processes.count()} has died"
        if processes.is_first():
            # It may have said why.
            with contextlib.suppress(JaxRuntimeError):
                verdict = self._said() or verdict
                self._tell_all(verdict)
        self._give_up(verdict)

    def _run(self) -> None:
        beats, answered = 0, time.monotonic()
        while not self._is_over.wait(self._interval):
            beats += 1
            try:
                self._store.key_value_set(
                    f"{_ALIVE}/{processes.index()}", str(beats), allow_overwrite=True
                )
                verdict = self._verdict()
                answered = time.monotonic()
            except JaxRuntimeError:
                if time.monotonic() - answered < self._timeout:
                    continue
                verdict = "process 0, the coordinator, does not answer any more"
            if verdict:
                self._give_up(verdict)
                return

    def _give_up(self, verdict: str) -> None:
        with self._ending:
            if not self._is_over.is_set():
                self._is_over.set()
                self._end(f"error: {verdict}; this process ends too: {self._advice}")

    def _verdict(self) -> str | None:
        if not processes.is_first():
            return _got(self._store, _VERDICT)
        found = self._said() or self._silent()
        if found:
            self._tell_all(found)
        return found

    def _tell_all(self, verdict: str) -> None:
        self._store.key_value_set(_VERDICT, verdict, allow_overwrite=True)
        # So long the others take to read it, at most: the store ends with this process.
        time.sleep(2 * self._interval)

    def _said(self) -> str | None:
        """Returns what a process has said at its end; None: none has."""
        for key, reason in self._store.key_value_dir_get(_ENDED):
            return _told(_number(key), reason)
        return None

    def _silent(self) -> str | None:
        """Returns which process has been silent for too long; None: none has."""
        now = time.monotonic()
        for key, beat in self._store.key_value_dir_get(_ALIVE):
            known, since = self._seen.get(key, ("", now))
            if beat != known:
                self._seen[key] = (beat, now)
            elif now - since > self._timeout:
                return (
                    f"process {_number(key)} of {processes.count()} has given no sign "
                    f"of life for {now - since:.0f} s"
                )
        return None


@contextlib.contextmanager
def watched(timeout: float, advice: str, host: str | None) -> Iterator[None]:
    """Watches over the processes of a run, if there are several.

    An error of this process is told to the others, who end too. One that is the echo of
    the end of another process ends this one with the line that says so.

    Args:
        timeout: See :class:`Watch`.
        advice: See :class:`Watch`.
        host: See :class:`Watch`.
    """
    if processes.count() == 1:
        yield
        return
    watch = Watch(timeout, advice, host)
    try:
        yield
    except JaxRuntimeError as error:
        watch.explain()
        watch.tell(error)
        raise
    except BaseException as error:
        watch.tell(error)
        raise
    processes.wait_for_all("end")
    watch.close()


def _told(number: Any, reason: str) -> str:
    return f"process {number} of {processes.count()} has ended ({reason})"


def leave(status: int) -> None:
    """Ends this process at once, if it is one of several.

    The end of Python's interpreter would wait for the others.
    """
    if processes.is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end(line: str) -> None:
    os.write(2, f"{line}\n".encode())
    os._exit(FAILED)


def _got(store: Any, key: str) -> str | None:
    try:
        return store.key_value_try_get(key)
    except JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _number(key: str) -> str:
    return key.rsplit("/", 1)[-1]
