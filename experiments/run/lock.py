"""The lock of a directory of results: one process at a time, until it ends."""

import os
import socket
from pathlib import Path

from experiments.errors import UserError
from experiments.run.files import make_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


class Lock:
    """Holds a directory for this process and those that inherit the lock.

    It ends with them.

    Args:
        directory: Made if missing.

    Raises:
        UserError: If another process has it, or it cannot be made.
    """

    def __init__(self, directory: Path):
        make_directory(directory)
        self._directory = directory
        # Not "w": what it says of its holder is to stay readable.
        self._file = (directory / LOCK_FILE).open("ab", buffering=0)
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = held_by(directory) or "another process"
                self._file.close()
                raise UserError(
                    f"--out {directory} is in use by {holder}, or by one that it "
                    "started; wait for its end, or give another --out"
                ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process have the directory."""
        self._file.close()

    def fileno(self) -> int:
        """The descriptor, for child processes to inherit."""
        return self._file.fileno()

    def check(self) -> None:
        """Raises UserError if the directory is no longer the one that was locked."""
        ours = os.fstat(self._file.fileno())
        try:
            theirs = (self._directory / LOCK_FILE).stat()
        except FileNotFoundError:
            theirs = None
        if theirs is None or not os.path.samestat(ours, theirs):
            raise UserError(
                f"--out {self._directory} was deleted while the run wrote to it; its "
                "results are lost, start it again"
            )


def held_by(directory: Path) -> str:
    """Returns what the lock of a directory says of its last holder; "": nothing."""
    try:
        return (directory / LOCK_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


class Unlocked:
    """In the place of :class:`Lock`, where another process of the run has the lock."""

    def close(self) -> None:
        """The other process has it."""

    def __enter__(self) -> "Unlocked":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def check(self) -> None:
        """The other process checks."""
