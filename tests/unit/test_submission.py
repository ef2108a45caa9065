"""What a submission would do, whole; and what is undone when a step of it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher import handover, lighthouse, submission
from launcher.layers import resolve
from launcher.model import BlindError, KitError, UsageError
from launcher.opening import SCRIPT_JOB, TORCHTITAN_JOB
from launcher.process import Completed
from launcher.rundir import Outputs
from launcher.slurm import Slurm
from tests.conftest import REPOSITORY, golden

CONFIG = """
[model]
name = "llama3"
[training]
steps = 7
[comm]
init_timeout_seconds = 300
train_timeout_seconds = 100
[fault_tolerance]
process_group_timeout_ms = 30000
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(autouse=True)
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A lighthouse that is named; what of it is asked here is whether it is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        named = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setitem(LIGHTHOUSE, "TORCHFT_LIGHTHOUSE", named)
        yield named


#: In the environment of a submission.
LIGHTHOUSE: dict[str, str] = {}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a config $(x).toml"
    path.write_text(CONFIG)
    return path


class Sbatch:
    """Refuses what it does not know."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[list[str]] = []
        self.env: dict[str, str] = {}

    def with_env(self, env: Mapping[str, str]) -> Slurm:
        self.env = dict(env)
        return Slurm(self)

    def __call__(self, argv: Sequence[str]) -> Completed:
        self.calls.append(list(argv))
        if argv[0] == "sbatch":
            answer = "77\n" if self.code == 0 else ""
            return Completed(tuple(argv), self.code, answer, "sbatch: error: no such partition")
        if argv[0] == "scancel":
            return Completed(tuple(argv), 0, "", "")
        raise AssertionError(f"not expected: {argv}")


def planned(path: Path, tmp_path: Path, **flags: Any) -> submission.Submission:
    env = {"TFT_OUTPUTS": str(tmp_path / "out"), **LIGHTHOUSE}
    said = {"config": str(path), "replicas": 2, **flags}
    return submission.plan(resolve(said, env, profile="sandbox"), env)


@pytest.mark.parametrize(
    ("name", "flags", "profile"),
    [
        ("sandbox", {"replicas": 2}, "sandbox"),
        ("h100", {"replicas": 4, "spares": 1, "max_replicas": 8, "name": "an 8B's run"}, "h100"),
        ("soperator", {"replicas": 3, "flags": ["--job.description", "5 $(x)"]}, "soperator"),
        ("ddp", {"replicas": 16, "method": "ddp"}, "h100"),
        (
            "diloco",
            {
                "replicas": 3,
                "method": "diloco",
                "nodes_per_replica": 2,
                "flags": ["--training.steps=200"],
            },
            "h100",
        ),
        (
            "script",
            {"replicas": 2, "script": "examples/train_ddp.py", "flags": ["--steps", "it's $(x)"]},
            "h100",
        ),
    ],
)
def test_a_dry_run_prints_the_exact_commands(
    name: str, flags: dict[str, Any], profile: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    env = {"TFT_CONFIG": "configs/run.toml"}
    config = {} if "script" in flags else {"config": str(path)}
    found = resolve({**flags, **config}, env, profile=profile)
    lines = submission.plan(found, env).lines()
    text = "\n".join(lines).replace(str(path), "configs/run.toml") + "\n"
    golden(Path("tests/unit/golden") / f"submit-{name}.txt", text)


def test_the_tasks_get_the_settings_and_the_manifest_says_them(
    config: Path, tmp_path: Path, url: str
) -> None:
    fake, told = Sbatch(), list[str]()
    plan = planned(config, tmp_path, max_replicas=3, flags=["--job.description", "a 'b' $(c)\nd"])
    run = submission.submit(plan, {"PATH": "x"}, say=told.append, slurm_with=fake.with_env)
    (call,) = fake.calls
    assert call[:3] == ["sbatch", "--parsable", "--array=0-1"]
    assert call[-1] == TORCHTITAN_JOB
    assert fake.env["TFT_CONFIG"] == str(config)
    assert fake.env["TORCHFT_LIGHTHOUSE"] == url
    assert fake.env["TFT_MAX_REPLICAS"] == "3"
    assert fake.env["PATH"] == "x"
    manifest = run.manifest()
    assert (manifest.group_size, manifest.replicas, manifest.steps) == (3, 2, 7)
    assert manifest.extra_args == ("--job.description", "a 'b' $(c)\nd")
    record = json.loads(run.submission.read_text())
    assert record["job"] == [TORCHTITAN_JOB]
    assert stat.S_IMODE(os.stat(run.submission).st_mode) == 0o600
    there = {"TFT_OUTPUTS": str(tmp_path / "out")}
    steps = submission.next_steps(run, plan, there)
    assert "tft-77: 2 of 3 replica groups" in steps[0]
    assert steps[-1].endswith("launcher cancel tft-77")
    # In a shell that looks elsewhere, the run is named by its path.
    elsewhere = shlex.split(submission.next_steps(run, plan, {})[-1])[-1]
    assert Path(elsewhere).resolve() == run.path.resolve()


def test_a_script_of_the_users_own_gets_its_flags_as_they_are(tmp_path: Path) -> None:
    script = tmp_path / "my train.py"
    script.write_text("")
    fake = Sbatch()
    env = {"TFT_OUTPUTS": str(tmp_path / "out"), **LIGHTHOUSE}
    said = {"script": str(script), "replicas": 2, "flags": ["--lr", "$(x) 'y'\nz"]}
    plan = submission.plan(resolve(said, env, profile="sandbox"), env)
    assert "TFT_EXTRA_ARGS" not in plan.environment
    run = submission.submit(plan, env, say=lambda line: None, slurm_with=fake.with_env)
    assert fake.calls[0][-4:] == [SCRIPT_JOB, str(script), "--lr", "$(x) 'y'\nz"]
    assert run.manifest().script_args == ("--lr", "$(x) 'y'\nz")
    with pytest.raises(UsageError, match="not both"):
        submission.plan(resolve({**said, "config": "c.toml"}, env), env)


def test_with_ddp_a_group_takes_its_share_of_a_node(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    said = {"config": str(path), "replicas": 16, "method": "ddp"}
    plan = submission.plan(resolve(said, {}, profile="h100"), {})
    assert {"--oversubscribe", "--gpus-per-node=1", "--cpus-per-task=16"} <= set(plan.flags)
    assert plan.environment["TFT_RANKS_PER_NODE"] == "1"
    assert "--method=ddp" in plan.lighthouse


def test_groups_of_several_nodes(config: Path, tmp_path: Path) -> None:
    plan = planned(config, tmp_path, nodes_per_replica=2)
    assert "--nodes=2" in plan.flags
    fake = Sbatch()
    run = submission.submit(plan, {}, say=lambda line: None, slurm_with=fake.with_env)
    assert (run.manifest().nodes_per_group, run.manifest().ranks_per_node) == (2, 2)


def test_a_refused_job_leaves_nothing(config: Path, tmp_path: Path) -> None:
    fake = Sbatch(code=1)
    with pytest.raises(KitError, match="no such partition"):
        submission.submit(
            planned(config, tmp_path), {}, say=lambda line: None, slurm_with=fake.with_env
        )
    assert Outputs(tmp_path / "out").runs() == []


class SilentSbatch(Sbatch):
    """Takes the job, and does not say so in time."""

    def __call__(self, argv: Sequence[str]) -> Completed:
        if argv[0] == "sbatch":
            self.calls.append(list(argv))
            self.token = next(a for a in argv if a.startswith("--comment=")).partition("=")[2]
            raise BlindError("sbatch did not answer within 30 s")
        if argv[0] == "squeue":
            self.calls.append(list(argv))
            return Completed(tuple(argv), 0, f"60|other\n77|{self.token}\n77|{self.token}\n", "")
        return super().__call__(argv)


def test_a_job_that_slurm_took_without_a_word_is_cancelled(config: Path, tmp_path: Path) -> None:
    fake, told = SilentSbatch(), list[str]()
    with pytest.raises(BlindError):
        submission.submit(planned(config, tmp_path), {}, say=told.append, slurm_with=fake.with_env)
    assert fake.calls[-1] == ["scancel", "77"]
    assert told == ["job 77 is cancelled again"]


def test_what_would_change_the_array_behind_our_back_is_left_out(
    config: Path, tmp_path: Path
) -> None:
    fake = Sbatch()
    env = {"SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "0-9", "SLURM_GPUS_ON_NODE": "1",
           "SLURM_CONF": "/c", "SBATCH_RESERVATION": "r"}  # fmt: skip
    submission.submit(
        planned(config, tmp_path), env, say=lambda line: None, slurm_with=fake.with_env
    )
    kept = {name for name in env if name in fake.env}
    assert kept == {"SLURM_CONF", "SBATCH_RESERVATION"}


def test_a_submission_is_a_run_of_its_own(config: Path) -> None:
    found = resolve({"config": str(config), "replicas": 1}, {})
    with pytest.raises(UsageError, match="TFT_RUN is tft-12"):
        submission.plan(found, {"TFT_RUN": "tft-12"})


def test_every_contradiction_is_told_at_once(tmp_path: Path) -> None:
    said = {"config": "c.toml", "script": "none.py", "nodes_per_replica": 2, "max_replicas": 1}
    path = tmp_path / "p.yaml"
    path.write_text("container: /x.sif\n")
    with pytest.raises(UsageError) as refused:
        submission.plan(resolve({**said, "replicas": 3}, {}, profile=str(path)), {})
    for part in ("--max-replicas 1", "not both", "which a container has not", "'none.py' cannot"):
        assert part in str(refused.value)


def test_a_named_lighthouse_must_be_there(config: Path, tmp_path: Path, url: str) -> None:
    plan = planned(config, tmp_path)
    plan = dataclasses.replace(
        plan, resolved=resolve({}, {"TORCHFT_LIGHTHOUSE": "http://127.0.0.1:1"})
    )
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        submission.submit(plan, {}, say=print, slurm_with=Sbatch().with_env)


def test_a_run_of_this_machine_sees_to_its_ranks_itself(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG + "[parallelism]\ndata_parallel_shard_degree = 2\n")
    profile = tmp_path / "p.yaml"
    profile.write_text("gpus_per_node: 8\ndevice: cpu\n")
    found = resolve({"config": str(path), "replicas": 2}, {}, profile=str(profile))
    assert "TFT_RANKS_PER_NODE" not in submission.plan(found, {}, local=True).environment
    with pytest.raises(UsageError, match="data_parallel_shard_degree"):
        submission.plan(found, {})


def test_a_script_learns_by_the_method_that_was_said(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.write_text("")
    found = resolve({"script": str(script), "replicas": 3, "method": "local-sgd"}, {})
    plan = submission.plan(found, {})
    assert plan.training.method.name == "local-sgd"
    assert "--method=local-sgd" in plan.lighthouse


def test_a_shells_variables_are_stronger_than_a_files(tmp_path: Path, config: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("variables: {NCCL_DEBUG: INFO, A: file}\ndevice: cpu\nranks_per_node: 2\n")
    env = {"NCCL_DEBUG": "WARN"}
    found = resolve({"config": str(config), "replicas": 1}, env, profile=str(path))
    handed = submission.plan(found, env).environment
    assert (handed.get("NCCL_DEBUG"), handed["A"]) == (None, "file")


@pytest.mark.parametrize("error", [UsageError("it serves run tft-5"), KeyboardInterrupt()])
def test_what_was_done_is_undone_when_a_later_step_fails(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def refuse(*args: object) -> None:
        raise error

    monkeypatch.setattr(lighthouse.LighthouseDir, "claim", refuse)
    fake, told = Sbatch(), list[str]()
    with pytest.raises(type(error)):
        submission.submit(planned(config, tmp_path), {}, say=told.append, slurm_with=fake.with_env)
    assert fake.calls[-1] == ["scancel", "77"]
    assert told == ["job 77 is cancelled again"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": None}, "say how many replica groups"),
        ({"max_replicas": 1}, "--max-replicas 1 is less than --replicas 2"),
        ({"config": "/no/where.toml"}, "config file /no/where.toml does not exist"),
        (
            {"flags": ["--fault_tolerance.replica_id=3"]},
            "must not set --fault_tolerance.replica_id",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_submitted(
    config: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        planned(config, tmp_path, **change)


def test_only_the_repositorys_root_will_do(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve({"config": str(config), "replicas": 1}, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not the root of the repository"):
        submission.plan(found, {})


def indices(replicas: int, most: int, spares: int) -> str:
    return handover.indices(replicas, most, spares)


@pytest.mark.parametrize(
    ("arguments", "array"),
    [((1, 1, 0), "0"), ((4, 4, 0), "0-3"), ((4, 4, 2), "0-5"), ((2, 4, 1), "0-1,4")],
)
def test_spares_come_after_every_replica_group_that_there_can_be(
    arguments: tuple[int, int, int], array: str
) -> None:
    assert indices(*arguments) == array


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "submit", *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--replicas=2", "--", "--training.steps", "200"], ["config  configs/llama3", "--training.steps 200"]),
        (["a.toml", "--replicas=2", "--", "--x"], ["a.toml", "flags  --x"]),
        (["--script=my.py", "--replicas=2", "--", "--its", "--own"], ["script  my.py", "flags  --its --own"]),
    ],
)  # fmt: skip
def test_what_follows_two_dashes_is_for_the_trainer(words: list[str], shown: list[str]) -> None:
    cut = words.index("--")
    done = cli(*words[:cut], "--explain", *words[cut:])
    assert done.returncode == 0, done.stderr
    text = re.sub(r" {2,}", "  ", done.stdout)
    for part in shown:
        assert part in text


def test_a_stray_word_is_refused() -> None:
    done = cli("a.toml", "stray", "--replicas=2")
    assert done.returncode == 2
    assert "stray" in done.stderr


def test_without_slurm_nothing_is_begun() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "submit", "configs/debug-cpu.toml", "--replicas=1"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/nonexistent", "TFT_DEVICE": "cpu", "TFT_RANKS_PER_NODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "sbatch is not on this machine's PATH" in done.stderr or "no tokenizer" in done.stderr
