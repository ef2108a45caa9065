"""The relay between a manager and a lighthouse that comes and goes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from launcher.relay import Relay


class Echo:
    """A server that answers what it is told, with its name in front."""

    def __init__(self, name: bytes) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.place: tuple[str, int] = self._socket.getsockname()
        self._name = name
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(one)
            threading.Thread(target=self._answer, args=(one,), daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                one.sendall(self._name + data)

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def servers() -> Iterator[list[Echo]]:
    found = [Echo(b"a:"), Echo(b"b:")]
    yield found
    for server in found:
        with contextlib.suppress(OSError):
            server.end()


def ask(relay: Relay, text: bytes, seconds: float = 5.0) -> bytes:
    with socket.create_connection(("127.0.0.1", relay.port), timeout=seconds) as client:
        client.sendall(text)
        return client.recv(1 << 16)


def test_it_passes_on_what_it_gets(servers: list[Echo]) -> None:
    with Relay(lambda: servers[0].place) as relay:
        assert ask(relay, b"hello") == b"a:hello"
        assert ask(relay, b"x" * 1000) == b"a:" + b"x" * 1000


def test_a_client_is_held_until_there_is_a_server(servers: list[Echo]) -> None:
    place: list[tuple[str, int]] = []
    with Relay(lambda: place[0] if place else None) as relay:
        threading.Timer(0.3, lambda: place.append(servers[0].place)).start()
        started = time.monotonic()
        assert ask(relay, b"early") == b"a:early"
        assert time.monotonic() - started > 0.25


def test_a_server_that_ends_ends_its_clients_which_find_the_next(servers: list[Echo]) -> None:
    place = [servers[0].place]
    with Relay(lambda: place[0]) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as client:
            client.sendall(b"1")
            assert client.recv(100) == b"a:1"
            place[0] = servers[1].place
            servers[0].end()
            assert client.recv(100) == b""
        assert ask(relay, b"2") == b"b:2"


def test_dropping_ends_connections_and_nothing_else(servers: list[Echo]) -> None:
    with Relay(lambda: servers[0].place) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as client:
            client.sendall(b"1")
            assert client.recv(100) == b"a:1"
            relay.drop()
            assert client.recv(100) == b""
        assert ask(relay, b"2") == b"a:2"


def test_a_closed_relay_listens_no_more(servers: list[Echo]) -> None:
    relay = Relay(lambda: None)
    port = relay.port
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as held:
        relay.close()
        relay.close()
        assert held.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_client_that_gave_up_waiting_is_not_heard(servers: list[Echo]) -> None:
    heard: list[tuple[str, int]] = []
    silent = socket.create_server(("127.0.0.1", 0))
    silent.settimeout(1.0)
    with silent, Relay(lambda: heard[0] if heard else None) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as client:
            client.sendall(b"an old request")
            time.sleep(0.3)
        time.sleep(0.3)
        heard.append(silent.getsockname())
        with pytest.raises(TimeoutError):
            silent.accept()


def test_a_server_that_falls_silent_is_connected_to_anew() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(5.0)
        with (
            Relay(silent.getsockname, silence=0.3) as relay,
            socket.create_connection(("127.0.0.1", relay.port), timeout=5) as client,
        ):
            server, _ = silent.accept()
            with server:
                time.sleep(1.2)  # nobody says anything: that is no silence
                client.sendall(b"1")
                assert server.recv(10) == b"1"
                server.sendall(b"2")
                assert client.recv(10) == b"2"
                client.sendall(b"3")
                assert client.recv(10) == b"", "no answer: the connection is ended"


def test_it_says_whether_the_server_can_be_reached(servers: list[Echo]) -> None:
    place: list[tuple[str, int] | None] = [servers[0].place]
    with Relay(lambda: place[0]) as relay:
        assert relay.reaches()
        servers[0].end()
        assert not relay.reaches()
        place[0] = None
        assert not relay.reaches(), "nobody knows where it is"
