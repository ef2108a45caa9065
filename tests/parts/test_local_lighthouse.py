"""The lighthouse of a run of one machine, with processes that are made up."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

from launcher import local_lighthouse
from launcher.children import Children
from launcher.lighthouse import Address, LighthouseDir
from launcher.local_lighthouse import OwnLighthouse
from launcher.model import KitError
from launcher.rundir import Outputs


class MadeUp(Children):
    """Processes 101, 102, …: each does what ``lives`` says of it when it is started."""

    def __init__(self, folder: LighthouseDir, lives: Sequence[bool]) -> None:
        self.folder, self.lives = folder, list(lives)
        self.started: list[tuple[str, ...]] = []
        self.env: Mapping[str, str] = {}
        self.codes: dict[int, int] = {}

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
        at_our_end: signal.Signals = signal.SIGKILL,
    ) -> int:
        assert at_our_end is signal.SIGTERM, "so that it withdraws its address"
        self.started.append(tuple(argv))
        self.env, pid = env, 100 + len(self.started)
        if self.lives.pop(0):
            self.folder.publish(
                Address(url="http://127.0.0.1:1", host="h", port=1, pid=pid,
                        process_started=0.0, user="u", started=0.0)
            )  # fmt: skip
        else:
            out.write(b"error: port 5 is taken\n")
            self.codes[pid] = 2
        return pid

    def code(self, pid: int) -> int | None:
        return self.codes.pop(pid, None)


def made(outputs: Outputs, *lives: bool) -> tuple[OwnLighthouse, MadeUp, list[str]]:
    run, said = outputs.run_of_array(50), list[str]()
    children = MadeUp(LighthouseDir(outputs.lighthouses / run.name), lives)
    env = {"TFT_LIGHTHOUSE_BIND": "10.0.0.1", "TFT_TIMEOUTS": "fast", "TORCHFT_LIGHTHOUSE": "x"}
    return OwnLighthouse(run, children, env, said.append), children, said


def test_it_is_the_runs_own_on_this_machine_alone(hostile: Path) -> None:
    lighthouse, children, said = made(Outputs(hostile), False, True)
    lighthouse.come_up(lambda: False)
    flags = [word for word in children.started[1] if word.startswith("--")]
    port = lighthouse.url.rpartition(":")[2]
    assert lighthouse.url == f"http://127.0.0.1:{port}"
    assert flags == ["--host=127.0.0.1", f"--port={port}", "--name=tft-50", f"--outputs={hostile}"]
    assert f"--port={port}" not in children.started[0], "another port, as that was taken"
    assert children.env == {"TFT_TIMEOUTS": "fast"}
    assert said == [f"the lighthouse is up at {lighthouse.url} (pid 102)"]


def test_one_that_does_not_come_up_says_why(hostile: Path) -> None:
    lighthouse, children, _ = made(Outputs(hostile), False, False, False)
    with pytest.raises(KitError, match=r"does not come up: error: port 5 is taken \("):
        lighthouse.come_up(lambda: False)
    assert len(children.started) == 3


def test_its_supervisor_is_started_again(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_lighthouse, "FIRST_PAUSE", 0.0)
    lighthouse, children, said = made(Outputs(hostile), True, True)
    lighthouse.come_up(lambda: False)
    lighthouse.keep()
    assert len(children.started) == 1
    children.codes[101] = -9
    lighthouse.keep()
    assert len(children.started) == 2
    assert children.started[1] == children.started[0], "where the groups look for it"
    assert "supervisor died (-9)" in said[-1]
