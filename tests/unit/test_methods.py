"""How groups learn together: flags, refusals, and batch sizes."""

from __future__ import annotations

import importlib.util
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import gpus, preflight
from launcher.batches import Batches, Layout, batches
from launcher.config import Site
from launcher.environment import Task, replica_environment
from launcher.methods import METHODS, Learning, lighthouse_problem, lines, resolve, schedule
from launcher.model import UsageError
from launcher.rundir import Manifest, Outputs
from tests.conftest import REPOSITORY
from tests.unit.conftest import MANIFEST

EXTENDED = {"job": {"custom_config_module": "torchtitan.components.ft.config"}}


def layout(ranks: int = 1, **degrees: int) -> Layout:
    flags = [f"--parallelism.{name}_degree={value}" for name, value in degrees.items()]
    return Layout.of({}, flags, ranks)


def problems(
    method: str, *flags: str, ranks: int = 1, capability: tuple[int, int] | None = None, **more: Any
) -> list[str]:
    settings = {
        **EXTENDED,
        "fault_tolerance": {"process_group": "nccl"},
        **more.pop("settings", {}),
    }
    facts: dict[str, Any] = {"steps": None, "device": "cuda", "process_group": "nccl"}
    return list(
        Learning(
            method=METHODS[method],
            schedule=schedule(METHODS[method], settings, flags),
            layout=layout(ranks, **more.pop("degrees", {})),
            capability=capability,
            **{**facts, **more},
        ).problems()
    )


class TestFlags:
    def test_methods_of_every_step_need_none(self) -> None:
        assert METHODS["hsdp"].flags({}) == METHODS["ddp"].flags({}) == []

    def test_what_the_config_file_says_is_not_said_again(self) -> None:
        assert METHODS["local-sgd"].flags({}) == [
            "--fault_tolerance.semi_sync_method=local_sgd",
            "--fault_tolerance.sync_steps=10",
            "--job.custom_config_module=torchtitan.components.ft.config",
        ]
        settings = {**EXTENDED, "fault_tolerance": {"sync_steps": 30}}
        assert METHODS["diloco"].flags(settings) == ["--fault_tolerance.semi_sync_method=diloco"]

    def test_the_users_flags_win(self) -> None:
        plan = schedule(METHODS["diloco"], EXTENDED, ["--fault_tolerance.sync-steps", "30"])
        assert plan is not None
        assert plan.sync_steps == 30

    def test_torchtitan_has_every_setting(self) -> None:
        """The names stand in torchtitan's source, which is not imported here."""
        (found,) = importlib.util.find_spec("torchtitan").submodule_search_locations  # type: ignore
        source = (Path(found) / "components/ft/config/job_config.py").read_text()
        for method in METHODS.values():
            for name in method.settings:
                assert f"    {name}: int" in source


class TestWhichMethod:
    def test_by_the_variable_or_by_the_configuration(self) -> None:
        flags = ["--fault_tolerance.semi_sync_method", "diloco"]
        assert resolve("", {}, ()).name == "hsdp"
        assert resolve("", {}, flags).name == "diloco"
        assert resolve("diloco", {}, flags).name == "diloco"
        assert resolve("ddp", {}, ()).name == "ddp"
        assert resolve("", {"fault_tolerance": {"semi_sync_method": "local_sgd"}}, ()).name == (
            "local-sgd"
        )

    def test_two_that_contradict_each_other_are_refused(self) -> None:
        flags = ["--fault_tolerance.semi_sync_method=diloco"]
        with pytest.raises(ValueError, match="leave one of them out"):
            resolve("hsdp", {}, flags)
        with pytest.raises(ValueError, match="must be one of local_sgd, diloco, not 'fedavg'"):
            resolve("", {}, ["--fault_tolerance.semi_sync_method=fedavg"])


class TestRefusals:
    def test_what_works(self) -> None:
        assert problems("hsdp", ranks=8) == problems("ddp") == []
        assert problems("local-sgd", ranks=8, steps=1000) == []
        streaming = [
            "--fault_tolerance.num_fragments=4",
            "--fault_tolerance.fragment_sync_delay=24",
            "--fault_tolerance.fragment_update_alpha=0.5",
            "--fault_tolerance.should_quantize",
        ]
        assert problems("diloco", *streaming, capability=(9, 0), ranks=8, steps=1000) == []

    @pytest.mark.parametrize(
        ("method", "flags", "says"),
        [
            ("diloco", ["num_fragments=3"], "must be a multiple of num_fragments (3)"),
            (
                "diloco",
                ["num_fragments=4", "fragment_sync_delay=25"],
                "must be less than the 25 steps",
            ),
            ("diloco", ["fragment_update_alpha=1.5"], "must be from 0 to 1"),
            ("diloco", ["sync_steps=0"], "must be at least 1"),
            ("local-sgd", ["num_fragments=2"], "are for method diloco"),
            ("local-sgd", ["should_quantize"], "are for method diloco"),
        ],
    )
    def test_settings(self, method: str, flags: list[str], says: str) -> None:
        (problem,) = problems(method, *(f"--fault_tolerance.{flag}" for flag in flags))
        assert says in problem

    def test_what_is_learnt_after_the_last_sync_would_be_lost(self) -> None:
        (problem,) = problems("diloco", steps=1050)
        assert problem.endswith("1000 or 1100")
        (problem,) = problems("diloco", steps=1000, checkpoint_interval=150)
        assert "checkpoint.interval (150) must be a multiple of the 100 steps" in problem

    def test_layouts(self) -> None:
        (problem,) = problems("ddp", ranks=8)
        assert "--gpus-per-node=1" in problem
        (problem,) = problems("hsdp", ranks=8, degrees={"data_parallel_replicate": 8})
        assert "set it above 1" in problem
        (problem,) = problems("hsdp", ranks=8, degrees={"data_parallel_shard": 3})
        assert "has 8 ranks" in problem
        (problem,) = problems("diloco", ranks=8, degrees={"pipeline_parallel": 2})
        assert "set it to 1" in problem

    @pytest.mark.parametrize(
        ("facts", "says"),
        [
            ({"device": "cpu"}, "needs CUDA"),
            ({"process_group": "gloo"}, "needs CUDA"),
            ({"capability": (8, 0)}, "on this node 8.0"),
            ({}, "it is not known"),
        ],
    )
    def test_quantising_where_the_hardware_cannot(self, facts: dict[str, Any], says: str) -> None:
        (problem,) = problems("diloco", "--fault_tolerance.should_quantize", **facts)
        assert says in problem
        off = ["--fault_tolerance.should_quantize", "--fault_tolerance.no-should-quantize"]
        assert problems("diloco", *off, **facts) == []

    def test_a_lighthouse_that_would_leave_slow_groups_out(self) -> None:
        diloco = METHODS["diloco"]
        assert "--join-timeout-ms=3600000" in lighthouse_problem(diloco, 3, 10_000)
        assert not lighthouse_problem(diloco, 2, 10_000), "of two groups none can be left out"
        assert not lighthouse_problem(diloco, 3, 600_000)
        assert not lighthouse_problem(diloco, 3, 0), "one that somebody else started"
        assert not lighthouse_problem(METHODS["hsdp"], 3, 10_000)


def test_the_gpu_that_can_least_decides() -> None:
    capabilities = [(9, 0), (8, 9)]
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: capabilities[handle],
    )
    assert gpus.capability(nvml) == (8, 9)
    assert gpus.capability(types.SimpleNamespace()) is None


class TestBatches:
    def of(self, *flags: str, ranks: int = 8, groups: int = 4, **degrees: int) -> Batches:
        return batches({}, flags, layout(ranks, **degrees), groups)

    def test_by_default_every_rank_reads_its_own(self) -> None:
        sizes = self.of("--training.local_batch_size=2", "--training.seq_len=8192")
        assert (sizes.rank, sizes.group, sizes.whole) == (2, 16, 64)
        assert sizes.tokens == 64 * 8192
        assert "64 a step over 4 groups = 524,288 tokens" in sizes.line()

    def test_the_global_size_counts_all_replica_groups(self) -> None:
        sizes = self.of("--training.local_batch_size=2", "--training.global_batch_size=192")
        assert (sizes.accumulation, sizes.rank, sizes.group, sizes.whole) == (3, 6, 48, 192)
        assert "2 a rank, 3 times a step" in sizes.line()

    def test_ranks_that_share_a_model_share_its_data(self) -> None:
        assert self.of(tensor_parallel=4).readers == 2
        assert self.of(data_parallel_replicate=2, data_parallel_shard=4).readers == 8

    def test_what_does_not_come_out_even_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"x 8 data-parallel ranks x 4 groups = 64: 128, for"):
            self.of("--training.local_batch_size=2", "--training.global_batch_size=100")
        with pytest.raises(ValueError, match="local_batch_size must be at least 1"):
            self.of("--training.local_batch_size=0")
        with pytest.raises(ValueError, match="seq_len must be a whole number, not 'long'"):
            self.of("--training.seq_len=long")

    def test_two_lines_say_it_all(self) -> None:
        flags = ["--fault_tolerance.num_fragments=4", "--fault_tolerance.fragment_sync_delay=5"]
        plan = schedule(METHODS["diloco"], EXTENDED, flags)
        one, two = lines(METHODS["diloco"], plan, self.of("--training.seq_len=1024"))
        assert one == (
            "method diloco: a sync every 25 steps, of one of 4 fragments (the whole model in 100), "
            "overlapping 5 steps; 6,553,600 tokens between two syncs"
        )
        assert two.startswith("batch: 8 a rank, once a step; 64 a replica group")


class TestBeforeAnythingIsStarted:
    def site(self, monkeypatch: pytest.MonkeyPatch, **env: str) -> Site:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(preflight, "_check_tokenizer", lambda folder, config: None)
        monkeypatch.setattr(preflight, "_check_data", lambda path, config: None)
        usual = {"TFT_CONFIG": "configs/debug-cpu.toml", "TFT_DEVICE": "cpu"}
        return Site.from_environment({**usual, "TFT_RANKS_PER_NODE": "2", **env})

    def test_everything_wrong_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        extra = (
            "--training.global_batch_size 7 --fault_tolerance.num_fragments 3 "
            "--fault_tolerance.should_quantize --training.steps 130"
        )
        site = self.site(monkeypatch, TFT_METHOD="diloco", TFT_EXTRA_ARGS=extra)
        with pytest.raises(UsageError) as refused:
            preflight.check(site, 2)
        for part in ("num_fragments", "should_quantize", "training.steps", "global_batch_size"):
            assert part in str(refused.value)
        assert preflight.check(site).batches is None, "a classic job has no groups"

    @pytest.mark.parametrize("method", METHODS)
    def test_one_config_file_for_every_method(
        self, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        env = {"TFT_CONFIG": "configs/llama3.1-8b.toml", "TFT_DEVICE": "cuda", "TFT_METHOD": method}
        env["TFT_RANKS_PER_NODE"] = "1" if method == "ddp" else "8"
        training = preflight.check(self.site(monkeypatch, **env), 4)
        assert training.method.name == method
        assert training.batches is not None
        assert training.batches.whole == 4 * int(env["TFT_RANKS_PER_NODE"])
        assert len(training.lines) == 2

    def test_an_unknown_method(self) -> None:
        with pytest.raises(UsageError, match="one of hsdp, ddp, local-sgd, diloco, not 'fsdp'"):
            Site.from_environment({"TFT_METHOD": "fsdp"})


def test_an_old_manifest_is_of_the_only_method_there_was(tmp_path: Path) -> None:
    run = Outputs(tmp_path).run_of_array(50)
    run.path.mkdir(parents=True)
    run.manifest_path.write_text(
        '{"run": "tft-50", "array_job_id": 50, "group_size": 2, "ranks_per_group": 1, "config": "c"}'
    )
    assert (run.manifest().method, run.manifest().sync_every) == ("hsdp", 1)


@pytest.mark.parametrize(
    ("method", "base", "expected"),
    [
        ("hsdp", {}, ("600", "1200")),
        ("diloco", {}, ("3600", "7200")),
        ("diloco", {"TORCHFT_QUORUM_TIMEOUT_SEC": "900"}, ("900", "7200")),
    ],
)
def test_a_group_waits_as_long_as_its_method_needs(
    tmp_path: Path, method: str, base: dict[str, str], expected: tuple[str, str]
) -> None:
    site, run = Site.from_environment(base), Outputs(tmp_path).run_of_array(50)
    manifest: Manifest = replace(MANIFEST, method=method)
    env = replica_environment(base, site, manifest, run, Task(replica=0, node="n"))
    assert (env["TORCHFT_QUORUM_TIMEOUT_SEC"], env["TORCHFT_QUORUM_RETRIES"]) == expected
