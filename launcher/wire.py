"""What a replica group's leader and its nodes say to each other: JSON messages over TCP.

Both sides prove that they know the same key, without sending it. A side whose process ends, however
it ends, is noticed at once by the other; one that falls silent with its machine or its network, by
the kernel's keepalives.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import socket
import struct
import threading
from multiprocessing.connection import Connection
from typing import Any

#: Seconds of silence before the other machine is asked whether it is there, between two such
#: questions, and their number: it counts as gone after 11 s.
KEEP_IDLE, KEEP_EVERY, KEEP_COUNT = 3, 2, 4
#: Seconds that connecting, and proving to know the key, may take.
HANDSHAKE_SECONDS = 10.0
#: Bytes of the longest message: a command line and an environment.
LONGEST = 4 << 20
#: Errors of a machine that does not answer any more; others are of a process that has ended.
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class Channel:
    """One connection; sending is safe from several threads, receiving is for one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.silent = False
        """Whether it ended because the other machine does not answer."""

    def send(self, do: str, **fields: object) -> bool:
        """Say something; False when the other side is gone."""
        data = json.dumps({"do": do, **fields}).encode()
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._connection.send_bytes(data)
            return True
        return False

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, waited for until the connection ends, or for ``seconds``; None: it
        has ended, or that time is over."""
        try:
            if seconds is not None and not self._connection.poll(seconds):
                return None
            message = json.loads(self._connection.recv_bytes(LONGEST))
        except OSError as error:
            self.silent = error.errno in _SILENT
            return None
        except (EOFError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """End it; whoever receives on the other side is told so."""
        with (
            contextlib.suppress(OSError, ValueError),
            socket.socket(fileno=_duplicate(self._connection)) as sock,
        ):
            sock.shutdown(socket.SHUT_RDWR)  # also wakes the thread that receives here


def listen() -> socket.socket:
    """A socket that nodes connect to, at a free port of every interface."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # it may be switched off on this node
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=256)


def accept(sock: socket.socket, key: str) -> Channel | None:
    """The channel of a connection that was just accepted; None: it does not know the key."""
    return _prove(sock, key, first=True)


def connect(host: str, port: int, key: str) -> Channel | None:
    """A channel to whoever listens there; None: nobody does, or without knowing the key."""
    try:
        sock = socket.create_connection((host, port), HANDSHAKE_SECONDS)
    except OSError:
        return None
    return _prove(sock, key, first=False)


def _prove(sock: socket.socket, key: str, *, first: bool) -> Channel | None:
    """Each side sets the other a task that only who knows the key can do."""
    sock.settimeout(None)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEP_IDLE),
        (socket.TCP_KEEPINTVL, KEEP_EVERY),
        (socket.TCP_KEEPCNT, KEEP_COUNT),
        (socket.TCP_NODELAY, 1),
        # The same for what was sent and is not confirmed, milliseconds.
        (socket.TCP_USER_TIMEOUT, 1000 * (KEEP_IDLE + KEEP_EVERY * KEEP_COUNT)),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _limit(sock, HANDSHAKE_SECONDS)
    connection: Connection = Connection(sock.detach())
    try:
        mine = os.urandom(32)
        connection.send_bytes(mine)
        theirs = connection.recv_bytes(len(mine))
        connection.send_bytes(_proof(key, first, theirs + mine))
        if not hmac.compare_digest(
            connection.recv_bytes(len(mine)), _proof(key, not first, mine + theirs)
        ):
            raise ValueError("it does not know the key")
        with socket.socket(fileno=_duplicate(connection)) as again:
            _limit(again, 0.0)
    except (OSError, EOFError, ValueError):
        connection.close()
        return None
    return Channel(connection)


def _proof(key: str, first: bool, asked: bytes) -> bytes:
    """What only who knows the key can answer; the two sides' answers differ: neither is an echo."""
    side = b"leader" if first else b"node"
    return hmac.digest(key.encode(), side + asked, "sha256")


def _limit(sock: socket.socket, seconds: float) -> None:
    """Seconds after which a read gives up; 0: never."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def _duplicate(connection: Connection) -> int:
    return os.dup(connection.fileno())
