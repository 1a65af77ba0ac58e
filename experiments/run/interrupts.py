"""SIGTERM and SIGINT as a request to stop at the end of the step."""

import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes the first SIGTERM or SIGINT while it is entered.

    The first one gives SIGINT back to its old handler, so that Ctrl-C acts at once.
    More SIGTERMs change nothing: a scheduler may send it to a process and to its
    parent, which passes it on. Outside the main thread, where Python cannot handle
    signals, it notes none.

    Attributes:
        signal: The signal noted, None until then.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._old_handlers = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {
                number: signal.signal(number, self._note) for number in _SIGNALS
            }
        return self

    def __exit__(self, *exception) -> None:
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())

    def _note(self, number, frame):
        del frame
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, self._old_handlers.pop(signal.SIGINT))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
