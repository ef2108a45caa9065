"""Ports opened for a moment, so that a node can try to reach this machine."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterable

#: Seconds between two looks at whether it is to end.
_LOOK_EVERY = 0.2


class Listener:
    """Answers every connection with ``token`` and closes it, in a thread of its own.

    ``open`` are the ports it got; ``taken`` those it did not, with the system's word on why.
    """

    def __init__(self, ports: Iterable[int], token: str, address: str = "") -> None:
        """``address`` to listen on; empty: every interface."""
        self._token = token
        self._sockets: dict[int, socket.socket] = {}
        self.taken: dict[int, str] = {}
        for port in ports:
            try:
                self._sockets[port] = _listening(address, port)
            except (OSError, OverflowError) as error:
                self.taken[port] = getattr(error, "strerror", None) or str(error)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    @property
    def open(self) -> list[int]:
        return list(self._sockets)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        for one in self._sockets.values():
            one.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for one in self._sockets.values():
                selector.register(one, selectors.EVENT_READ)
            while not self._stop.is_set():
                for key, _ in selector.select(_LOOK_EVERY):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        connection, _ = key.fileobj.accept()
                        with connection:
                            connection.settimeout(1.0)
                            connection.sendall(self._token.encode())


def _listening(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


def heard(host: str, port: int, token: str, timeout: float) -> str:
    """Why no listener with ``token`` was heard at ``host:port``; empty when it was."""
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.settimeout(timeout)
            said = b""
            while len(said) < len(token) and (more := connection.recv(256)):
                said += more
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if said.decode(errors="replace") == token else "something else answers"
