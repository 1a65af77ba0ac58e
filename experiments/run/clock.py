"""A stop-watch of the device's work."""

import time
from typing import Any

import jax


class Clock:
    """Seconds of training: runs from ``start`` to ``stop``.

    Args:
        seconds: Counted before.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._started = None

    def start(self) -> None:
        """Starts it, if it stands."""
        if self._started is None:
            self._started = time.monotonic()

    def stop(self, awaited: Any) -> float:
        """Stops it when the device has computed ``awaited``; returns all seconds."""
        jax.block_until_ready(awaited)
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
            self._started = None
        return self._seconds
