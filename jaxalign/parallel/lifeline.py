"""A line between the processes of a run that breaks when one of them dies.

JAX hears of a dead process where the others exchange numbers with it. Where they do
not, waiting for a checkpoint or sampling each by itself, it hears by a missing
heartbeat, after a minute. So each process holds a connection to the first one, over
which nothing is sent: the system closes it with the process. Who comes to its end says
so before.
"""

import atexit
import contextlib
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Sequence


__all__ = ["Listener", "connect", "own_address", "watch"]

_WELL = b"."
"""What a process says that has come to its end."""

_PATIENCE = 30.0
"""Seconds for a connection to be made."""


class Listener:
    """The first process's end, before the others are there.

    Args:
      host: where they reach it.
    Raises:
      OSError: no port can be had.
    """

    def __init__(self, host: str):
        near = host in ("localhost", "127.0.0.1")
        self._server = socket.create_server((host if near else "", 0))
        self._token = secrets.token_hex(16)
        self.place = f"{host} {self._server.getsockname()[1]} {self._token}"
        """What the others need to connect; a port scanner has it not."""

    def accept(self, count: int) -> list[socket.socket]:
        """Return connections, fewer where somebody does not come."""
        found: list[socket.socket] = []
        self._server.settimeout(_PATIENCE)
        with self._server, contextlib.suppress(TimeoutError):
            while len(found) < count:
                line, _ = self._server.accept()
                line.settimeout(_PATIENCE)
                said = line.recv(len(self._token), socket.MSG_WAITALL)
                if secrets.compare_digest(said, self._token.encode()):
                    found.append(line)
                else:
                    line.close()
        return found


def connect(place: str) -> list[socket.socket]:
    """Connect to the first process; without a line where it cannot be reached."""
    host, port, token = place.split()
    try:
        line = socket.create_connection((host, int(port)), timeout=_PATIENCE)
        line.sendall(token.encode())
    except OSError:
        return []
    return [line]


def own_address() -> str:
    """Return the address under which other hosts reach this one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:  # no network at all
            return "127.0.0.1"
        return probe.getsockname()[0]


def watch(lines: Sequence[socket.socket], lost: Callable[[], None]) -> None:
    """Call ``lost`` from a thread when a line breaks whose other end was not well.

    Args:
      lines: of :meth:`Listener.accept` or :func:`connect`.
      lost: ends this process.
    """
    selector = selectors.DefaultSelector()
    for line in lines:
        line.setblocking(False)
        selector.register(line, selectors.EVENT_READ, line)

    def wait() -> None:
        while selector.get_map():
            for key, _ in selector.select():
                said = b""
                with contextlib.suppress(OSError):
                    said = key.data.recv(1)
                selector.unregister(key.data)
                if said != _WELL:
                    lost()

    def end_well() -> None:
        for line in lines:
            with contextlib.suppress(OSError):  # it has ended before
                line.sendall(_WELL)

    atexit.register(end_well)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()
