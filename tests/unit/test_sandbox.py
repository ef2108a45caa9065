"""The sandbox touches only folders of its own; what it starts is in tests/e2e."""

import json
from pathlib import Path

import pytest

from launcher import namespaces
from launcher.model import KitError, UsageError
from launcher.sandbox import Sandbox
from tests.conftest import FakeRun


@pytest.fixture(autouse=True)
def _as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program: program)


def test_a_folder_that_is_not_a_sandboxs_is_neither_used_nor_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for act in (Sandbox(mine).down, Sandbox(mine).up):
        with pytest.raises(UsageError, match="is no sandbox's"):
            act()
    for act in (Sandbox(mine / "thesis.tex").down, Sandbox(mine / "thesis.tex").up):
        with pytest.raises(UsageError, match="is no sandbox's"):
            act()
    assert (mine / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["with space", "quo'te", "new\nline", "$(touch x)"])
def test_paths_that_slurms_configuration_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain paths only"):
        Sandbox(tmp_path / name).up()


def test_no_sandbox_is_nothing_to_end(tmp_path: Path) -> None:
    assert Sandbox(tmp_path / "none").down() is False


def test_only_a_sandbox_with_networks_can_be_cut(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
    for act in (sandbox.cut, sandbox.heal, sandbox.crash, sandbox.restart):
        with pytest.raises(UsageError, match="no sandbox is up"):
            act("worker-0")
    sandbox.folder.mkdir()
    kind = sandbox.folder / "nodes.json"
    kind.write_text('{"nodes": 2}')  # as an earlier version wrote it
    with pytest.raises(UsageError, match="sandbox up --network"):
        sandbox.cut("worker-0")
    assert sandbox.environment()["TFT_LIGHTHOUSE_HOST"] == "127.0.0.1"
    kind.write_text('{"nodes": 2, "network": "10.213.7"}')
    for name in ("worker-2", "login", "../switch", ""):
        for act in (sandbox.cut, sandbox.crash):
            with pytest.raises(UsageError, match="it has worker-0, worker-1"):
                act(name)
    env = sandbox.environment()
    assert (env["TFT_INTERFACE"], env["TFT_NODE_ADDRESS"]) == ("eth0", "")
    assert env["TFT_LIGHTHOUSE_HOST"] == env["TFT_LIGHTHOUSE_BIND"] == "10.213.7.1"


def test_a_machine_without_namespaces_says_so_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, fake_run: FakeRun
) -> None:
    folder = Path("/tmp/tft-never-made")
    monkeypatch.setattr("launcher.namespaces.run", fake_run)
    fake_run.on("unshare", err="unshare: unshare failed: Operation not permitted\n", code=1)
    with pytest.raises(UsageError, match=r"CAP_NET_ADMIN.*Operation not permitted"):
        Sandbox(folder).up(network=True)
    assert not folder.exists()


ADDRESSES = [{"ifname": "lo", "addr_info": [{"local": "127.0.0.1", "prefixlen": 8}]}]


@pytest.mark.parametrize(
    ("routes", "pool"),
    [
        ([{"dst": "default", "dev": "eth0"}], "10.213"),
        ([{"dst": "0.0.0.0/1", "dev": "tun0"}, {"dst": "10.0.0.0/8", "dev": "tun0"}], "172.29"),
        ([{"dst": "10.213.0.0/16"}, {"dst": "172.16.0.0/12", "dev": "docker0"}], "198.18"),
    ],
)
def test_a_subnet_is_free_on_this_machine(
    routes: list[dict[str, str]],
    pool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_run: FakeRun,
) -> None:
    """Whatever the folder's name, and so where the search begins."""
    monkeypatch.setattr("launcher.namespaces.run", fake_run)
    for program in ("ip", "nsenter", "unshare"):
        fake_run.on(program)
    fake_run.on("ip", "link", "show", code=1)
    fake_run.on("ip", "-json", "-4", "address", out=json.dumps(ADDRESSES))
    fake_run.on("ip", "-json", "-4", "route", out=json.dumps(routes))
    for number in range(20):
        network = namespaces.create(tmp_path / str(number), ["worker-0"])
        assert network.subnet.startswith(f"{pool}.")
        assert len(namespaces.link_name(network.folder)) <= 15


def test_no_free_subnet_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: FakeRun
) -> None:
    monkeypatch.setattr("launcher.namespaces.run", fake_run)
    fake_run.on("ip", "link", "show", code=1)
    fake_run.on("ip", "-json", "-4", "address")
    taken = [{"dst": f"{pool}.0.0/16"} for pool in namespaces.POOLS]
    fake_run.on("ip", "-json", "-4", "route", out=json.dumps(taken))
    with pytest.raises(KitError, match="no subnet is free"):
        namespaces.create(tmp_path / "net", ["worker-0"])
    assert not any("add" in call for call in fake_run.calls)


def test_removing_what_is_not_there_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: FakeRun
) -> None:
    monkeypatch.setattr("launcher.namespaces.run", fake_run)
    namespaces.remove(tmp_path / "net")
    assert fake_run.calls == []
