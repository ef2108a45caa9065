"""What a lighthouse lets whoever has its address know."""

from __future__ import annotations

import re
import socket
import urllib.parse
import urllib.request

from launcher.model import UsageError

#: Seconds that the lighthouse's status page may take.
STATUS_SECONDS = 3.0
#: Age of a heartbeat, in seconds, up to which its sender counts as alive.
FRESH_SECONDS = 2.0
#: Replica id under which the supervisor brings a lighthouse past the ids of the one before.
RAISER = "raise:0"


def split(url: str) -> tuple[str, int]:
    """Host and port of ``http://host:port``.

    Raises:
        UsageError: it is not such an address.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is not a lighthouse address: {error}") from error
    if parts.scheme not in ("http", "https") or not host or not port:
        raise UsageError(f"{url!r} is not a lighthouse address like http://host:29510")
    return host, port


def answers(url: str, timeout: float = 3.0) -> str | None:
    """None when something accepts connections at ``url``, else why not."""
    host, port = split(url)
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return None
    except OSError as error:
        return error.strerror or str(error)


def responds(url: str) -> str | None:
    """None when a lighthouse at ``url`` answers a question, else why not. (Its supervisor accepts
    connections, and holds them, also while there is none.)"""
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=STATUS_SECONDS) as page:  # noqa: S310
            page.read(1)
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def require_answer(url: str) -> None:
    """Check that the lighthouse accepts connections from here.

    Raises:
        UsageError: it does not.
    """
    if (problem := answers(url)) is not None:
        raise UsageError(
            f"the lighthouse {url} cannot be reached from {socket.gethostname()} ({problem}): "
            "`python -m launcher lighthouse status` on the login node tells whether it runs; "
            "`lighthouse up --host ADDRESS` publishes another of its addresses"
        )


def refuse_strangers(url: str) -> None:
    """Check that nobody trains on this lighthouse, before the first task of a run joins it.

    The claim beside it is found by folder and address; this also finds a run that was
    started from another clone, or under another name of the same machine.

    Raises:
        UsageError: somebody's replica groups send heartbeats to it.
    """
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=STATUS_SECONDS) as answer:  # noqa: S310
            page = answer.read(1 << 20).decode(errors="replace")
    except (OSError, ValueError):
        return  # it accepts connections (checked before), and says nothing of its members
    found = re.findall(r"(\S+): seen ([\d.]+)s ago", page)
    fresh = [
        name.partition(":")[0]
        for name, age in found
        if float(age) < FRESH_SECONDS and name != RAISER
    ]
    if fresh:
        raise UsageError(
            f"the lighthouse {url} already serves another run ({', '.join(sorted(fresh)[:4])} send "
            "heartbeats): two runs on one lighthouse would train as one. Wait for it to end, or "
            "start a second lighthouse (`python -m launcher lighthouse up --port 29511`) and set "
            "TORCHFT_LIGHTHOUSE to its address"
        )
