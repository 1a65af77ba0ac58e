"""A connection from each process of a run to the first, which the death of one closes.

Nothing goes over it but the number of a process, and a word at its end: the operating
system closes the connections of a process that dies, however it dies.
"""

import contextlib
import socket
import threading
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
        if processes.is_first():
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
            self._start(self._listen, found, 0)

    def close(self) -> None:
        """Says good-bye."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.sendall(_BYE)

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
                self._listen(found, int.from_bytes(number, "big"))

    def _listen(self, found: socket.socket, index: int) -> None:
        with found:
            try:
                said = found.recv(1)
            except OSError:
                said = b""
        if said != _BYE:
            self._lost(index)

    def _start(self, function: Callable, *args) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()
