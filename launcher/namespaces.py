"""A network of its own for every node of the sandbox, that can be cut and healed.

    this machine, "login node"      the switch                 a node
    tft1a2b3c4d 10.213.7.1 ────── login = bridge = worker-0 ────── eth0 10.213.7.10

Each node is a network namespace; so is the switch, so that this machine gets a single new
interface, and no firewall of it ever sees what nodes say to each other. Nodes reach each other
and this machine, and nothing beyond it.

Namespaces are held by files in the sandbox's folder, and the interface is named after it: what
to remove is known without asking any process, and nothing of another sandbox is ever touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

import psutil

from launcher.model import KitError, UsageError
from launcher.process import Completed, run

#: The network interface of every node, as the node sees it.
INTERFACE = "eth0"
SWITCH = "switch"
#: Where a free subnet is looked for: private addresses, and those reserved for measurements.
POOLS = ("10.213", "172.29", "198.18")
#: A node's address ends in this plus its number.
FIRST = 10
#: A route to more than a /8 is a default route in disguise (of a VPN).
WIDEST = 8

#: What `require` tries in namespaces that end with it: each of the things done later.
TRIAL = (
    "hostname trial && ip link add name a type veth peer name b && ip link add name c type bridge "
    "&& mount --bind /etc/hosts /etc/hosts && mount --bind /etc/nsswitch.conf /etc/nsswitch.conf"
)
#: Names are looked up in these files only: elsewhere a node would wait for a name server that
#: it cannot reach.
LOOKUPS = 'mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/nsswitch" /etc/nsswitch.conf'
#: Mounts of this machine that come and go later are seen inside, and not the other way.
OWN_MOUNTS = ("--mount", "--propagation=slave")


@dataclass(frozen=True, slots=True)
class Network:
    """The network of one sandbox; ``folder`` holds its namespaces."""

    folder: Path
    subnet: str
    """The first three numbers of its addresses."""

    @property
    def login(self) -> str:
        """This machine's address in it."""
        return f"{self.subnet}.1"

    def address(self, number: int) -> str:
        return f"{self.subnet}.{FIRST + number}"

    def at_login(self, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` on this machine, where nodes are known by name."""
        script = f'{LOOKUPS} && shift && exec "$@"'
        return ["unshare", *OWN_MOUNTS, "sh", "-c", script, "sh", str(self.folder), *argv]

    def inside(self, node: str, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` on ``node``; the process keeps its id all along."""
        script = f'{LOOKUPS} && hostname "$2" && shift 2 && exec "$@"'
        # Not `ip netns exec`: it mounts another /sys, which hides the cgroups.
        enter = ["nsenter", f"--net={self.folder / node}", "unshare", "--uts", *OWN_MOUNTS]
        return [*enter, "sh", "-c", script, "sh", str(self.folder), node, *argv]

    def cut(self, node: str) -> None:
        """Unplug ``node``: as with a pulled cable, connections hang rather than break."""
        self._at_switch("ip", "link", "set", "dev", node, "down")

    def heal(self, node: str) -> None:
        self._at_switch("ip", "link", "set", "dev", node, "up")

    def build(self, link: str, nodes: Sequence[str]) -> None:
        """Make the namespaces of the switch and of ``nodes``, and wire them up."""
        self._write_names(nodes)
        for name in (SWITCH, *nodes):
            place = self.folder / name
            place.touch()
            _ok("unshare", f"--net={place}", "true")
        peer = ["peer", "name", "login", "netns", str(self.folder / SWITCH)]
        _ok("ip", "link", "add", "name", link, "type", "veth", *peer)
        self._at_switch("ip", "link", "add", "name", "bridge", "up", "type", "bridge")
        self._at_switch("ip", "link", "set", "dev", "login", "master", "bridge", "up")
        for number, node in enumerate(nodes):
            peer = ["peer", "name", INTERFACE, "netns", str(self.folder / node)]
            self._at_switch("ip", "link", "add", "name", node, "type", "veth", *peer)
            self._at_switch("ip", "link", "set", "dev", node, "master", "bridge", "up")
            enter = ("nsenter", f"--net={self.folder / node}", "ip")
            _ok(*enter, "link", "set", "dev", "lo", "up")
            _ok(*enter, "address", "add", f"{self.address(number)}/24", "dev", INTERFACE)
            _ok(*enter, "link", "set", "dev", INTERFACE, "up")
        _ok("ip", "address", "add", f"{self.login}/24", "dev", link)
        _ok("ip", "link", "set", "dev", link, "up")

    def _write_names(self, nodes: Sequence[str]) -> None:
        hosts = ["127.0.0.1 localhost", "::1 localhost", f"{self.login} {socket.gethostname()}"]
        hosts += [f"{self.address(number)} {node}" for number, node in enumerate(nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # Users and groups are looked up as ever.
        lookups = Path("/etc/nsswitch.conf").read_text().splitlines()
        kept = [line for line in lookups if not line.lstrip().startswith("hosts:")]
        (self.folder / "nsswitch").write_text("\n".join([*kept, "hosts: files"]) + "\n")

    def _at_switch(self, *argv: str) -> None:
        _ok("nsenter", f"--net={self.folder / SWITCH}", *argv)


def require() -> None:
    """Check that networks can be made here, without leaving a trace.

    Raises:
        UsageError: they cannot; says what the machine refuses.
    """
    done = run(["unshare", "--net", "--uts", "--mount", "sh", "-c", TRIAL])
    if done.code != 0:
        raise UsageError(
            "nodes with a network of their own (--network) need namespaces and virtual interfaces "
            f"(CAP_SYS_ADMIN and CAP_NET_ADMIN), and this machine refuses them: {_said(done)}"
        )


def create(folder: Path, nodes: Sequence[str]) -> Network:
    """Make the network of ``nodes``, with its files in ``folder``.

    Raises:
        KitError: something could not be made, or no subnet is free; `remove` clears up.
    """
    folder.mkdir()
    remove(folder)  # of a sandbox whose folder somebody deleted
    link = link_name(folder)
    candidates = [f"{pool}.{number}" for pool in POOLS for number in range(256)]
    # Two sandboxes that come up at once begin at different places.
    start = random.Random(link).randrange(256)  # noqa: S311
    for subnet in [*candidates[start:], *candidates[:start]]:
        if any(IPv4Network(f"{subnet}.0/24").overlaps(other) for _, other in _taken()):
            continue
        network = Network(folder, subnet)
        network.build(link, nodes)
        if all(
            name == link or not IPv4Network(f"{subnet}.0/24").overlaps(other)
            for name, other in _taken()
        ):
            return network
        remove(folder)  # another took it in the same moment
    raise KitError(f"no subnet is free on this machine in {', '.join(POOLS)}: see `ip route`")


def remove(folder: Path) -> None:
    """End what runs in the network of ``folder``, and remove it; also one half made.

    Raises:
        KitError: a part of it stays.
    """
    if not folder.is_dir():
        return
    held = {_identity(path): path for path in folder.iterdir() if _is_namespace(path)}
    held.pop(_identity(Path("/proc/self/ns/net")), None)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _identity(Path(f"/proc/{process.pid}/ns/net")) in held:
                process.kill()
    link = link_name(folder)
    if run(["ip", "link", "show", "dev", link]).code == 0:
        _ok("ip", "link", "delete", "dev", link)
    for path in held.values():
        _ok("umount", "--lazy", str(path))


def link_name(folder: Path) -> str:
    """Name of this machine's interface: one for each folder, in the 15 letters Linux has."""
    return "tft" + hashlib.blake2b(bytes(folder.resolve()), digest_size=4).hexdigest()


def _taken() -> Iterator[tuple[str, IPv4Network]]:
    """What this machine reaches or has: (interface, subnet)."""
    for interface in json.loads(_ok("ip", "-json", "-4", "address").out or "[]"):
        for info in interface.get("addr_info", ()):
            yield interface["ifname"], IPv4Network(f"{info['local']}/{info['prefixlen']}", False)
    for route in json.loads(_ok("ip", "-json", "-4", "route", "show", "table", "all").out or "[]"):
        if re.match(r"[\d.]+(/\d+)?$", destination := route.get("dst", "")):
            network = IPv4Network(destination, False)
            if network.prefixlen >= WIDEST:
                yield route.get("dev", ""), network


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _is_namespace(path: Path) -> bool:
    """A namespace is mounted on its file, which thus is of another device than its folder."""
    return os.stat(path).st_dev != os.stat(path.parent).st_dev


def _ok(*argv: str) -> Completed:
    done = run(argv)
    if done.code != 0:
        raise KitError(f"`{' '.join(argv)}` failed: {_said(done)}")
    return done


def _said(done: Completed) -> str:
    said = (done.err or done.out).strip().splitlines()
    return said[-1] if said else f"exit code {done.code}"
