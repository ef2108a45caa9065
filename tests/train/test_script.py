"""A script of the user's own under torchrun, beside a real lighthouse: what it gets, what is told of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.command import SCRIPT, Torchrun, script_flags
from launcher.events import parse_replica_event
from launcher.inject import SCRIPT_MEMBER
from launcher.payload import why
from launcher.state import RunState
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]

#: A group that trains alone; its logging leaves torchft's loggers disabled, its name says nothing.
TRAINING = """
import logging.config, sys
import torch
from torchft import Manager, ProcessGroupGloo
logging.config.dictConfig({"version": 1})
state = {"state_dict": dict, "load_state_dict": lambda state: None}
manager = Manager(pg=ProcessGroupGloo(), min_replica_size=1, replica_id="mine", **state)
while manager.current_step() < 3:
    manager.start_quorum()
    manager.allreduce(torch.ones(1)).wait()
    manager.should_commit()
print("in the quorum as", manager._store.get("replica_id").decode())
print("sends along", *manager._manager_state_dict()["user"])
sys.exit(0)
"""


@pytest.fixture
def lighthouse() -> Iterator[str]:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    yield server.address()
    server.shutdown()


class Group:
    """Replica group 1 of a run, which runs a script."""

    def __init__(self, folder: Path, text: str, **env: str) -> None:
        self.events_file, self.failures = folder / "events.jsonl", folder / "failures.json"
        self.script = folder / "my train.py"
        self.script.write_text(textwrap.dedent(text))
        torchrun = Torchrun(
            ranks_per_node=1, log_dir=folder / "ranks", node_address="localhost", entry=SCRIPT
        )
        self.argv = torchrun.argv(script_flags(str(self.script), ["--n"]))
        self.env = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "TFT_DEVICE": "cpu",
            "TFT_EVENTS": str(self.events_file),
            "TFT_FAILURES": str(self.failures),
            "REPLICA_GROUP_ID": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        }

    def run(self) -> subprocess.CompletedProcess[str]:
        # Rank 0's output also goes to torchrun's own, behind a prefix.
        return subprocess.run(
            self.argv,
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def events(self) -> list[dict[str, Any]]:
        return list(map(json.loads, self.events_file.read_text().splitlines()))


def test_it_is_known_and_followed_like_the_trainer(lighthouse: str, tmp_path: Path) -> None:
    group = Group(tmp_path, TRAINING, TORCHFT_LIGHTHOUSE=lighthouse, TFT_MIN_STEP_SECONDS="0.3")
    done = group.run()
    assert done.returncode == 0, done.stderr
    events = group.events()
    kinds = [event["kind"] for event in events]
    assert kinds == ["start", "ready", "quorum", "commit", "commit", "commit", "end"]
    commits = [event for event in events if event["kind"] == "commit"]
    assert [(event["step"], event["committed"]) for event in commits] == [
        (0, True),
        (1, True),
        (2, True),
    ]
    assert commits[2]["t"] - commits[1]["t"] >= 0.29, "a step lasts as long as it is told to"
    assert "in the quorum as replica_1:" in done.stdout
    assert SCRIPT_MEMBER.format(replica=1, uuid="") == "replica_1:"  # what drills call it
    assert "sends along default tft" in done.stdout  # whoever heals learns from whom

    # To leave the quorum is no loss any more when it has said that it is done.
    state = RunState(2)
    for line in group.events_file.read_bytes().splitlines():
        event = parse_replica_event(line)
        assert event is not None
        state.apply(event)
    assert state.groups[1].ended_ok


def test_what_it_raises_reaches_the_launcher(tmp_path: Path) -> None:
    group = Group(tmp_path, "import sys\nraise ValueError(f'no data in {sys.argv[1]}')")
    assert group.run().returncode == 1
    assert why(group.failures).endswith("exited with code 1: ValueError: no data in --n")
    assert [event["kind"] for event in group.events()] == ["start"]


@pytest.mark.parametrize("steps", [0, 1])
def test_one_that_comes_too_late_ends(lighthouse: str, tmp_path: Path, steps: int) -> None:
    """Also when its peers finish between its first question and the quorum, of itself alone."""
    finish = (
        f"    if manager.current_step() == {steps}: open({str(tmp_path / 'finished')!r}, 'w')\n"
    )
    group = Group(
        tmp_path,
        TRAINING.replace("    manager.start_quorum()", f"{finish}    manager.start_quorum()"),
        TORCHFT_LIGHTHOUSE=lighthouse,
        TFT_ATTEMPT="2",
        TFT_FINISHED=str(tmp_path / "finished"),
    )
    done = group.run()
    assert done.returncode == 0
    assert "nothing is left" in done.stdout
    assert len([event for event in group.events() if event["kind"] == "commit"]) == steps


def test_ranks_wait_with_what_is_installed_imported_and_nothing_of_the_scripts_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "beside.py").write_text("import os\ngroup = os.environ['REPLICA_GROUP_ID']\n")
    (tmp_path / "yaml.py").write_text("of = 'mine'\n")  # hides a package
    group = Group(
        tmp_path,
        """
        import json, os, sys
        import psutil, yaml, beside
        from launcher.train import tell
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        from signal import pause
        with open(sys.argv[1], "w") as file:
            json.dump([psutil.here, yaml.of, beside.group, __file__ == sys.argv[0]], file)
        """,
        TFT_STANDBY=str(tmp_path / "assignment.json"),
    )
    assignment, out = tmp_path / "assignment.json", tmp_path / "out.json"
    assignment.touch()
    # Changed while they wait: it is what was imported before that counts.
    code = (
        "import sys; from launcher.train import rank, script\n"
        "def wait(path):\n"
        "    known = {'psutil', 'yaml', 'beside', 'launcher.train.tell'}\n"
        "    print(*sorted(known & set(sys.modules)), flush=True)\n"
        "    if 'psutil' in sys.modules: sys.modules['psutil'].here = True\n"
        "    await_assignment(path)\n"
        "await_assignment, rank.await_assignment = rank.await_assignment, wait\n"
        f"sys.argv = ['', *{script_flags(str(group.script), [])!r}]\n"
        "script.main()"
    )
    del group.env["REPLICA_GROUP_ID"]
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=group.env | {"RANK": "0"},
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        try:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "launcher.train.tell psutil\n"
            news = {"REPLICA_GROUP_ID": "1", "TFT_STACKS": str(tmp_path)}
            flags = script_flags(str(group.script), [str(out)])
            assignment.write_text(json.dumps({"flags": flags, "env": news}))
            assert waiting.wait(timeout=30) == 0
        finally:
            waiting.kill()
    assert json.loads(out.read_text()) == [True, "mine", "1", True]
    assert [(event["kind"], event["replica"]) for event in group.events()] == [
        ("start", 1),
        ("end", 1),
    ]
    assert (tmp_path / "stacks.0.txt").exists()


def test_it_hangs_for_a_drill_shows_its_stacks_and_ends_with_its_launcher(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "import time\nwhile True: time.sleep(0.1)",
        TFT_DRILLS="1",
        TFT_STACKS=str(tmp_path),
    )
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen(group.argv, cwd=REPOSITORY, env=group.env, stdout=log) as torchrun:
        try:
            deadline = time.monotonic() + 60
            while not group.events_file.exists() or not group.events_file.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (start,) = group.events()
            time.sleep(0.5)
            os.kill(start["pid"], signal.SIGUSR1)
            time.sleep(0.5)
            os.kill(start["pid"], signal.SIGQUIT)
            time.sleep(0.5)
            assert "hang_for_a_drill" in (tmp_path / "stacks.0.txt").read_text()
        finally:
            torchrun.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{start['pid']}").exists():
        assert time.monotonic() < deadline, "a rank outlives its launcher"
        time.sleep(0.1)
