"""A connection from each process of a run to the first, which the death of one closes.

Nothing goes over it but the number of a process, and a word at its end: the operating
system closes the connections of a process that dies, however it dies.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from experiments.distribution import processes

_ADDRESS = "address"
_BYE = b"."
_SECONDS = 10.0  # to connect in


class Connections:
    """The connections of this process; without a route to the first, there are none.

    Args:
        lost: Called with the number of a process whose connection was closed before it
            said good-bye; on another thread.
        host: Where the first process is, which the others have reached there. None: at
            the name that its machine has.
    """

    def __init__(self, lost: Callable[[int], None], host: str | None = None):
        self._lost = lost
        self._sockets: list[socket.socket] = []
        self._listening: list[threading.Thread] = []
        self._is_first = processes.is_first()
        if self._is_first:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            server = socket.create_server(
                ("", 0),
                family=family,
                backlog=processes.count(),
                dualstack_ipv6=family == socket.AF_INET6,
            )
            address = [host or socket.getfqdn(), str(server.getsockname()[1])]
            processes.of_first(_ADDRESS, " ".join(address))
            self._start(self._accept, server)
            return
        named, port = processes.of_first(_ADDRESS, "").split(" ")
        with contextlib.suppress(OSError):
            found = socket.create_connection((host or named, int(port)), _SECONDS)
            found.settimeout(None)
            found.sendall(processes.index().to_bytes(4, "big"))
            self._sockets.append(found)
            # Its own descriptor: "close" gives up the other, at whatever time.
            self._start(self._hear_first, found.dup())

    def close(self) -> None:
        """Says good-bye. The connection itself ends with the process."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.sendall(_BYE)
            if not self._is_first:
                # Or Python would close it as soon as nothing here needs it.
                each.detach()

    def await_ends(self, seconds: float) -> bool:
        """Waits in the first process until the others have ended.

        The store goes with the first process, and JAX aborts a process that is still
        there then.

        Args:
            seconds: At most.

        Returns:
            Whether all that were connected have ended.
        """
        until = time.monotonic() + seconds
        for thread in self._listening:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._listening)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                found, _ = server.accept()
            except OSError:
                return
            self._start(self._meet, found)

    def _meet(self, found: socket.socket) -> None:
        with contextlib.suppress(OSError):
            number = found.recv(4, socket.MSG_WAITALL)
            if len(number) == 4:
                self._sockets.append(found)
                self._listening.append(threading.current_thread())
                self._listen(found, int.from_bytes(number, "big"))
                # Behind the good-bye: the end of the process closes the connection.
                found.recv(1)
                found.close()

    def _hear_first(self, found: socket.socket) -> None:
        with found:
            self._listen(found, 0)

    def _listen(self, found: socket.socket, index: int) -> None:
        try:
            said = found.recv(1)
        except OSError:
            said = b""
        if said != _BYE:
            found.close()
            self._lost(index)

    def _start(self, function: Callable, *args) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()
