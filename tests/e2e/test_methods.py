"""Each method on a real Slurm: groups learn together, one is killed, and comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launcher.lighthouse import LighthouseDir
from launcher.methods import METHODS
from launcher.sandbox import Sandbox
from tests.e2e.conftest import Workspace
from tests.e2e.test_recovery import training

pytestmark = pytest.mark.slurm
PORT = "29651"
STREAMING = (
    "--fault_tolerance.sync_steps=6 --fault_tolerance.num_fragments=2 "
    "--fault_tolerance.fragment_sync_delay=1 --fault_tolerance.fragment_update_alpha=0.25"
)


@pytest.fixture
def shell(cluster: Workspace) -> Iterator[Workspace]:
    shell = cluster.having(
        {
            "TFT_LIGHTHOUSE_PORT": PORT,
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{PORT}",
            "TFT_RANKS_PER_NODE": "1",
            "TFT_MIN_STEP_SECONDS": "0.1",
        }
    )
    shell.having({"TFT_METHOD": "diloco"}).launcher("lighthouse", "up", "--detach")
    address = LighthouseDir.of(shell.outputs, shell.env["TORCHFT_LIGHTHOUSE"]).address()
    assert address is not None
    assert address.join_timeout_ms == METHODS["diloco"].join_timeout_ms
    yield shell
    shell.launcher("lighthouse", "down")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("local-sgd", "--fault_tolerance.sync_steps=4"),
        ("diloco", STREAMING),
    ],
    ids=["local-sgd", "streaming-diloco"],
)
def test_groups_that_train_by_themselves(
    shell: Workspace, sandbox: Sandbox, method: str, flags: str
) -> None:
    submit = [f"--method={method}", "--", "--training.steps=6000", *flags.split()]
    with training(shell, sandbox, submit=submit) as going:
        incident = going.after(lambda: going.rank(1).kill())
        assert incident.healed_from == 0
        assert going.state.groups[0].failed_commits <= 1
        assert going.state.groups[0].attempt == 1


@pytest.mark.timeout(120)
def test_groups_of_one_rank_share_a_node(shell: Workspace, sandbox: Sandbox) -> None:
    """As docs/methods.md says to submit them: the script asks for whole nodes."""
    settings = {"TFT_METHOD": "ddp", "TFT_EXTRA_ARGS": "--training.steps 6000"}
    settings["TFT_RANKS_PER_NODE"] = ""  # as many as the task has GPUs
    flags = ["--oversubscribe", "--gpus-per-node=1", "--cpus-per-task=16", "--nodelist=worker-0"]
    with training(shell.having(settings), sandbox, flags=flags) as going:
        going.after(lambda: going.rank(1).kill())
        assert [group.host for group in going.state.groups.values()] == ["worker-0", "worker-0"]
        assert going.run.manifest().ranks_per_group == 1
