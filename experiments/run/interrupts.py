"""SIGTERM and SIGINT: answered at once, whatever the main thread is busy with.

Python runs its own handlers in the main thread, between two of its instructions: while
XLA compiles there are none, for minutes. A thread hears of a signal when it comes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable


class StopRequest:
    """Notes the first SIGTERM or SIGINT while it is entered.

    A line says at once that the run stops after its step. A SIGINT after that, or one
    that comes before there is anything to save, ends the process at once, with a line
    and status 130. More SIGTERMs change nothing: a scheduler may send it to a process
    and to its parent, which passes it on. Outside the main thread, where Python cannot
    handle signals, it notes none.

    Args:
        say: Called with the line, on another thread.

    Attributes:
        signal: The signal noted, None until then.
        can_save: Whether there is something to save; False at first.
    """

    def __init__(self, say: Callable[[str], None]):
        self.signal: signal.Signals | None = None
        self.can_save = False
        self._say = say
        self._is_told = False
        self._listener = _Listener((signal.SIGTERM, signal.SIGINT), self._hear)

    def __enter__(self) -> "StopRequest":
        self._listener.start(self._note)
        return self

    def __exit__(self, *exception) -> None:
        self._listener.stop()

    def _note(self, number, frame) -> None:
        """Runs in the main thread."""
        del frame
        self.signal = self.signal or signal.Signals(number)

    def _hear(self, number: int) -> None:
        """Runs in the listener's thread."""
        if number == signal.SIGINT and not self.can_save:
            _leave("stopped by SIGINT before the first step: there was nothing to save")
        elif not self._is_told:
            self._is_told = True
            self._say(
                f"{signal.Signals(number).name}: the run finishes its step, saves and "
                "ends; Ctrl-C now ends it at once, without saving"
            )
        elif number == signal.SIGINT:
            _leave(
                "stopped by SIGINT without saving; --resume continues from the last "
                "complete checkpoint"
            )


def leave_at_interrupt() -> None:
    """Lets SIGINT end the process, with a line and status 130, until something else."""
    listener = _Listener((signal.SIGINT,), lambda number: _leave("stopped by SIGINT"))
    listener.start(lambda number, frame: None)


class _Listener:
    """Calls a function, on a thread of its own, with the number of each signal."""

    def __init__(self, signals: tuple[int, ...], hear: Callable[[int], None]):
        self._signals, self._hear = signals, hear
        self._old_handlers = {}

    def start(self, handler: Callable) -> None:
        """Listens; ``handler`` is Python's own, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._heard, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._old_waker = signal.set_wakeup_fd(self._waker)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._old_handlers = {
            number: signal.signal(number, handler) for number in self._signals
        }

    def stop(self) -> None:
        """Puts back what was there before."""
        if not self._old_handlers:
            return
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())
        signal.set_wakeup_fd(self._old_waker)
        os.close(self._waker)
        self._thread.join()
        os.close(self._heard)

    def _listen(self) -> None:
        while numbers := os.read(self._heard, 1):
            if numbers[0] in self._signals:
                self._hear(numbers[0])


def _leave(line: str) -> None:
    """Ends the process; no handler of an exit, which may wait or complain, is run."""
    if sys.stdout.isatty():
        # A progress bar has hidden the cursor.
        os.write(sys.stdout.fileno(), b"\n\x1b[?25h")
    os.write(2, f"{line}\n".encode())
    os._exit(128 + signal.SIGINT)
