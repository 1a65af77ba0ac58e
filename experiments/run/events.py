"""TensorBoard events, written at once."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.summary import scalar

_SECONDS_BETWEEN_FLUSHES = 5.0


class Events:
    """An event file, written by the caller's thread.

    tensorboardX's own SummaryWriter writes from a thread. Where the disk is full that
    thread ends, and the next dozen events wait for it for ever.

    Args:
        directory: Made if missing; each process adds a file.
        purge_step: First step that this file tells anew; TensorBoard forgets those of
            earlier files from there on. None: nothing.
    """

    def __init__(self, directory: Path, purge_step: int | None = None):
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(purge_step, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step, summary=scalar(name, value))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **what) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **what))
        # Which waits for the disk.
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()
