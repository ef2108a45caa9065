"""Replica groups of two nodes each, on a real Slurm: a lost part costs that group only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.sandbox import Sandbox
from tests.e2e.conftest import Workspace
from tests.e2e.test_recovery import shell, training

__all__ = ["shell"]
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm sandbox needs root")
    sandbox = Sandbox(Path(f"/run/tft-test-{os.getpid()}"))
    sandbox.up(5)
    yield sandbox
    sandbox.down()


@pytest.mark.timeout(400)
def test_groups_of_two_nodes_survive_a_lost_rank_and_a_lost_node(
    shell: Workspace, sandbox: Sandbox
) -> None:
    with training(shell, sandbox, submit=["--nodes-per-replica=2"]) as going:
        going.full()
        manifest = going.run.manifest()
        assert (manifest.nodes_per_group, manifest.ranks_per_group) == (2, 2)
        first, second = going.state.groups[1].nodes

        # A rank on the second node dies: both nodes' ranks start again, in place.
        crash = going.after(lambda: going.rank(1, node=1).kill())
        assert f"on {second} was killed by SIGKILL" in crash.why
        assert crash.host == second
        assert (going.state.groups[1].attempt, going.state.groups[1].nodes) == (2, (first, second))

        # The second node goes down: the task comes back on two good ones.
        lost = going.after(lambda: sandbox.slurm().set_node_state(second, "DOWN", "test"))
        assert (lost.why, lost.host) == ("node down", second)
        assert second not in going.state.groups[1].nodes
        assert len(going.state.groups[1].nodes) == 2
        assert going.state.groups[0].attempt == 1, "the survivor is the same all along"
