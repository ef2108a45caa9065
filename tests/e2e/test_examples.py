"""Scripts of the user's own, as replica groups on a real Slurm: killed, healed, finished."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.model import GroupState
from launcher.rundir import RunDir
from launcher.sandbox import Sandbox
from launcher.watcher import Watcher
from tests.conftest import REPOSITORY
from tests.e2e.conftest import Workspace, eventually
from tests.e2e.test_recovery import submitted

JOB = "slurm/replica-group.sbatch"
PORT = "29651"
ARGUMENTS = ["--n", "", "two words", 'it\'s a "test"\nüñ→', "$(touch oops) ${local_rank} $$", "-h"]


@pytest.fixture
def shell(cluster: Workspace) -> Iterator[Workspace]:
    shell = cluster.having(
        {
            "TFT_LIGHTHOUSE_PORT": PORT,
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{PORT}",
            "TFT_RANKS_PER_NODE": "1",
        }
    )
    shell.launcher("lighthouse", "up", "--detach")
    yield shell
    shell.launcher("lighthouse", "down")


def submit(shell: Workspace, groups: int, *words: str) -> RunDir:
    job = int(shell.sh("sbatch", "--parsable", f"--array=0-{groups - 1}", JOB, *words))
    run = shell.outputs.run_of_array(job)
    eventually(run.manifest_path.is_file, 30, "the run starts")
    return run


def rank(run: RunDir, replica: int) -> psutil.Process:
    told = map(json.loads, run.events(replica).read_text().splitlines())
    return psutil.Process([event["pid"] for event in told if event["kind"] == "start"][-1])


@pytest.mark.slurm
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("pace", "words", "by_hand"),
    [
        ("0.1", ("examples/train_ddp.py", "--steps", "240"), True),
        ("0.3", ("examples/train_local_sgd.py", "--syncs", "80", "--every", "5"), False),
    ],
    ids=["ddp", "local_sgd"],
)
def test_a_script_survives_the_loss_of_a_rank(
    shell: Workspace, sandbox: Sandbox, pace: str, words: tuple[str, ...], by_hand: bool
) -> None:
    shell = shell.having({"TFT_MIN_STEP_SECONDS": pace})
    if by_hand:
        run = submit(shell, 2, *words)
    else:
        script = (f"--script={words[0]}", "--replicas=2", "--", *words[1:])
        run = shell.outputs.run_of_array(submitted(shell, *script))
    try:
        with Watcher.of_run(run, sandbox.slurm()) as watcher:
            state = watcher.state

            def seen(*steps: int) -> bool:
                watcher.look()
                return len(state.members) == 2 and min(g.step for g in state.groups.values()) > 20

            eventually(seen, 60, "both train")
            # Ranks wait beside it for its next start, as beside the trainer's.
            ready = run.path / "ranks" / "standby-1.1"
            eventually(ready.is_dir, 30, "the next ranks are started")
            rank(run, 1).kill()

            def recovered() -> bool:
                watcher.look()
                return any(i.recovered_at is not None for i in state.incidents)

            eventually(recovered, 60, "the lost group is back")
            (incident,) = state.incidents
            assert "was killed by SIGKILL" in incident.why
            assert incident.healed_from == 0
            assert (state.groups[1].attempt, state.groups[0].attempt) == (2, 1)

            def ended() -> bool:
                watcher.look()
                return state.finished

            eventually(ended, 90, "both are done")
            watcher.look(final=True)
            assert state.incidents == [incident], "leaving at the end is no loss"
            assert state.groups[0].failed_commits <= 1
            assert [group.state for group in state.groups.values()] == [GroupState.DONE] * 2
            assert state.weights.compared > incident.compared_before
            assert not state.weights.differences
            assert all(group.loss is not None for group in state.groups.values())
    finally:
        sandbox.slurm().cancel(int(run.name.removeprefix("tft-")))
    assert run.finished.exists()
    done = [
        re.findall(r"done at .*: weights \w{16}", run.log(i, "out").read_text()) for i in (0, 1)
    ]
    assert done[0] == done[1]
    assert len(done[0]) == 1


@pytest.mark.slurm
@pytest.mark.timeout(120)
def test_arguments_reach_a_script_unchanged(
    shell: Workspace, sandbox: Sandbox, hostile: Path
) -> None:
    script = hostile / "it's mine.py"
    script.write_text(
        "import json, os, sys\n"
        "import beside\n"
        "assert __name__ == '__main__' and beside.here\n"
        "with open(os.environ['REPLICA_GROUP_ID'] + '.json', 'w') as file:\n"
        "    json.dump(sys.argv, file)\n"
    )
    (hostile / "beside.py").write_text("here = True\n")
    run = submit(shell, 1, str(script), *ARGUMENTS)
    eventually(run.finished.exists, 60, "it is done")
    got = shell.root / "0.json"
    assert json.loads(got.read_text()) == [str(script), *ARGUMENTS]
    assert not list(shell.root.glob("**/oops"))
    told = shell.launcher("monitor", run.name, "--once")
    assert "replica 0 (attempt 1) finished" in told


def example(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """The parameter server's example, with its output in ``log``."""
    script = REPOSITORY / "examples" / "parameter_server.py"
    with log.open("wb") as file:
        argv = [sys.executable, "-u", str(script), *words]
        return subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.torch
@pytest.mark.timeout(120)
def test_a_parameter_server_outlives_its_workers(tmp_path: Path) -> None:
    log, logs = tmp_path / "server", [tmp_path / "0", tmp_path / "1"]
    address = re.compile(r"^serving at (\S+)$", re.M)
    started = [example(log, "serve", "--port", "0", "--updates", "400")]
    try:
        eventually(lambda: address.search(log.read_text()), 60, "it serves")
        started += [example(path, "work", *address.findall(log.read_text())) for path in logs]
        eventually(lambda: "step 100 " in logs[0].read_text(), 60, "a worker works")
        started[1].kill()
        assert [started[2].wait(60), started[0].wait(60)] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert re.search(r"^done after \d+ steps", logs[1].read_text(), re.M)
    assert "done: 400 updates, 1 workers lost" in log.read_text()
