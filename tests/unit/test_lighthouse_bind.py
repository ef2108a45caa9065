"""Where a lighthouse listens when nobody says."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from launcher.lighthouse_child import LighthouseSettings, own_address


def answers(monkeypatch: pytest.MonkeyPatch, *addresses: str, ours: tuple[str, ...] = ()) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found)

    class Probe:
        def __init__(self, family: int) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *details: object) -> None: ...
        def bind(self, where: Any) -> None:
            if where[0] not in ours:
                raise OSError("not ours")

    monkeypatch.setattr("socket.socket", Probe)


@pytest.mark.parametrize(
    ("addresses", "ours", "chosen"),
    [
        (["10.0.0.5"], ("10.0.0.5",), "10.0.0.5"),
        (["93.184.1.1", "10.0.0.5"], ("93.184.1.1", "10.0.0.5"), "10.0.0.5"),
        (["10.0.0.9"], (), ""),  # another machine's, or a name that only the nodes resolve so
        (["127.0.1.1"], ("127.0.1.1",), ""),  # as Debian writes it into /etc/hosts
        (["93.184.1.1"], ("93.184.1.1",), ""),
    ],
)
def test_a_private_address_of_this_machine_or_everywhere(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], ours: tuple[str, ...], chosen: str
) -> None:
    answers(monkeypatch, *addresses, ours=ours)
    assert own_address("login-0") == chosen


def test_a_name_that_nobody_knows_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **more: object) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert own_address("nowhere") == ""


def test_what_is_said_is_listened_on() -> None:
    assert LighthouseSettings(host="login-0", bind="10.0.0.5").listen == "10.0.0.5"
    assert LighthouseSettings(host="login-0").listen in ("::", "0.0.0.0")
