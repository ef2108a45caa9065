"""LocalSGD and DiLoCo among groups that come and go, beside what torchft does by itself."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", autouse=True)
def _cpu() -> None:
    from launcher.train import device

    device.prepare("cpu")


class FakeManager:
    """A torchft manager whose quorums come at once; the first ``failures`` syncs fail."""

    _use_async_quorum = False

    def __init__(self, *, peers_at: int = 0, failures: int = 0) -> None:
        self._step = 0
        self._peers_at, self._failures = peers_at, failures
        self.mean: float | None = None
        self.calls: list[str] = []

    def start_quorum(self) -> None:
        self.calls.append("quorum")
        if not self._failures:
            self._step = max(self._step, self._peers_at)  # it heals

    def current_step(self) -> int:
        return self._step

    def allreduce(self, tensor: Any, **more: Any) -> Any:
        if self.mean is not None:
            tensor.fill_(self.mean)  # with what the others have
        return types.SimpleNamespace(wait=lambda: True)

    def should_commit(self) -> bool:
        self._failures, failed = max(0, self._failures - 1), self._failures > 0
        self._step += not failed
        self.calls.append("failed" if failed else "commit")
        return not failed

    def register_state_dict_fn(self, *arguments: Any) -> None: ...
    def allow_state_dict_read(self) -> None: ...
    def disallow_state_dict_read(self) -> None: ...


def local_sgd(manager: Any, every: int = 4) -> tuple[Any, Callable[[], None]]:
    """(the method, a function that trains one step)."""
    import torch
    from torchft.local_sgd import LocalSGD

    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = LocalSGD(manager, model, optimizer, every)
    method.__enter__()
    return method, lambda: _step(model, optimizer)


def diloco(
    manager: Any, every: int = 8, fragments: int = 2, **more: Any
) -> tuple[Any, Callable[[], None]]:
    import torch
    from torchft.local_sgd import DiLoCo

    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(fragments)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9) for part in model]
    method = DiLoCo(manager, list(model), optimizer, outer, every, **more)
    method.__enter__()
    return method, lambda: _step(model, optimizer)


def _step(model: Any, optimizer: Any) -> None:
    import torch

    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def never() -> None:
    raise AssertionError("its peers have trained")


class TestJoining:
    """Upstream, a group that starts while others train learns a period for itself, and throws it away."""

    def test_upstream_is_wrong(self) -> None:
        manager = FakeManager(peers_at=7)
        _, train = local_sgd(manager)
        for _ in range(3):
            train()
        assert manager.calls == [], "if it meets the others at once now, join() can go"
        train()
        assert manager.calls == ["quorum", "commit"]

    @pytest.mark.parametrize("make", [local_sgd, diloco])
    def test_corrected(self, make: Any) -> None:
        from launcher.train.semi_sync import SemiSync

        manager = FakeManager(peers_at=7)
        method, train = make(manager)
        joined = SemiSync(method, manager)
        assert joined.every == 4
        assert joined.join(never), "it has healed from a peer that had trained"
        assert manager.calls == ["quorum", "commit"]
        for _ in range(4):
            assert len(manager.calls) == 2
            train()
        assert manager.calls == ["quorum", "commit"] * 2, (
            "and comes to the next sync with the others"
        )

    @pytest.mark.parametrize("make", [local_sgd, diloco])
    def test_the_start_of_a_run_is_a_sync_of_nothing(self, make: Any) -> None:
        from launcher.train.semi_sync import SemiSync

        manager, asked = FakeManager(), list[int]()
        method, _ = make(manager)
        parameters = [p for g in method._local_optimizer.param_groups for p in g["params"]]
        before = [p.detach().clone() for p in parameters]
        assert not SemiSync(method, manager).join(lambda: asked.append(1))
        assert manager.calls == ["quorum", "commit"]
        assert all(a.equal(b) for a, b in zip(before, parameters, strict=True))
        assert asked == [1], "a group that finds nobody may have come too late"

    def test_the_place_in_an_overlapped_sync_is_that_of_the_others(self) -> None:
        """They have sent a fragment, and take it after two more steps."""
        from launcher.train.semi_sync import SemiSync

        manager = FakeManager(peers_at=7)
        method, train = diloco(manager, fragment_sync_delay=2)
        assert SemiSync(method, manager).join(never)
        assert manager.calls == ["quorum"]
        train()
        assert manager.calls == ["quorum"]
        train()
        assert manager.calls == ["quorum", "commit"]
        for _ in range(4):
            train()
        assert manager.calls == ["quorum", "commit"] * 2

    def test_at_the_start_nothing_overlaps(self) -> None:
        from launcher.train.semi_sync import SemiSync

        manager = FakeManager()
        method, train = diloco(manager, fragment_sync_delay=3)
        SemiSync(method, manager).join(lambda: None)
        assert manager.calls == ["quorum", "commit"]
        for _ in range(4):
            train()
        assert manager.calls == ["quorum", "commit"] * 2

    def test_a_group_that_could_not_heal_asks_again(self) -> None:
        from launcher.train.semi_sync import SemiSync

        manager = FakeManager(peers_at=7, failures=2)
        method, _ = local_sgd(manager)
        assert SemiSync(method, manager).join(lambda: None)
        assert manager.calls == ["quorum", "failed"] * 2 + ["quorum", "commit"]


class TestTheStepAfterJoining:
    """A peer sends its state between its optimizer's step and its scheduler's."""

    def trainer(self, healed_at: int | None, finished: bool = False) -> Any:
        import torch

        from launcher.train.trainer import ReplicaTrainer

        trainer: Any = ReplicaTrainer.__new__(ReplicaTrainer)

        def join(too_late: Callable[[], None]) -> bool:
            if healed_at is None:
                too_late()
            trainer.step = healed_at or trainer.step
            return healed_at is not None

        def stop() -> None:
            trainer.looks += 1
            if finished and trainer.looks == 7:
                raise SystemExit(0)

        trainer.looks, trainer._may_be_too_late = 0, finished
        trainer.scheduled, trainer._joined, trainer.step = 0, False, 1
        trainer._stop_if_too_late = stop
        trainer._recorder = types.SimpleNamespace(rank=1)
        trainer._hash_every, trainer._hashed_step = 10**6, -1
        trainer.model_parts = [torch.nn.Linear(1, 1)]
        trainer.job_config = types.SimpleNamespace(training=types.SimpleNamespace(steps=100))
        schedule = types.SimpleNamespace(step=lambda: setattr(trainer, "scheduled", 1))
        trainer.lr_schedulers = schedule
        semi_sync = types.SimpleNamespace(join=join, every=4)
        trainer.ft_manager = types.SimpleNamespace(
            enabled=True, manager=FakeManager(), semi_sync=semi_sync
        )
        return trainer

    def test_it_is_the_one_after_the_peers(self) -> None:
        trainer = self.trainer(healed_at=24)
        assert trainer._join()
        assert (trainer.step, trainer.scheduled) == (25, 1)
        assert trainer._join(), "and once only"
        assert (trainer.step, trainer.scheduled) == (25, 1)

    def test_there_is_none_after_the_last(self) -> None:
        trainer = self.trainer(healed_at=100)
        assert not trainer._join()
        assert trainer.step == 100

    def test_a_run_begins_with_the_first(self) -> None:
        trainer = self.trainer(healed_at=None)
        assert trainer._join()
        assert (trainer.step, trainer.scheduled, trainer.looks) == (1, 0, 0)

    def test_peers_that_have_just_finished_are_given_time_to_say_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("launcher.train.trainer.time.sleep", lambda seconds: None)
        with pytest.raises(SystemExit):
            self.trainer(healed_at=None, finished=True)._join()


class TestWeightsInCommon:
    def test_those_of_local_sgd_are_the_models(self) -> None:
        from launcher.train.semi_sync import SemiSync

        method, _ = local_sgd(FakeManager())
        shared = SemiSync(method, FakeManager()).shared([method._model])
        assert [id(p) for p in shared] == [id(p) for p in method._model.parameters()]

    def test_those_of_diloco_are_the_global_ones_of_the_fragment(self) -> None:
        """A group's own weights differ, of the other fragment and with alpha also of this one."""
        import torch

        from launcher.train.semi_sync import SemiSync
        from launcher.train.weights import weight_hash

        hashes, own = [], []
        for learns in (1.0, 2.0):
            torch.manual_seed(0)
            manager = FakeManager()
            method, train = diloco(manager, fragment_update_alpha=0.5)
            joined = SemiSync(method, manager)
            joined.join(lambda: None)
            method._local_optimizer.param_groups[0]["lr"] *= learns
            for _ in range(3):
                train()
            manager.mean = 0.5
            train()
            assert manager.current_step() == 2
            (shared,) = joined.shared([])
            assert shared is method._fragments[1].original_parameters["weight"]
            hashes.append(weight_hash([shared]))
            own.append(
                [p.detach().clone() for p in method._fragments[1]._model_fragment.parameters()]
            )
        assert hashes[0] == hashes[1]
        assert not own[0][0].equal(own[1][0])

    def test_they_are_hashed_right_after_a_sync_and_never_before_one(self) -> None:
        import torch

        from launcher.train.trainer import ReplicaTrainer

        manager, told = FakeManager(), list[Any]()
        trainer: Any = ReplicaTrainer.__new__(ReplicaTrainer)
        trainer._hash_every, trainer._hashed_step = 1, -1
        trainer._recorder = types.SimpleNamespace(record=lambda kind, **f: told.append(f["step"]))
        trainer.model_parts = [torch.nn.Linear(1, 1)]
        trainer.ft_manager = types.SimpleNamespace(enabled=True, manager=manager, semi_sync=None)
        for step in (0, 0, 1, 1, 2):
            manager._step = step
            trainer._record_weights()
        assert told == [1, 2]


class TestOwnSteps:
    def test_they_are_told_before_the_sync_that_may_wait(self) -> None:
        from launcher.train.semi_sync import attached

        manager = FakeManager()
        ft_manager = types.SimpleNamespace(manager=manager, semi_sync=None)
        ft_manager.on_step = lambda: manager.calls.append("step")
        trains: list[Callable[[], None]] = []

        def original(config: Any, ft_manager: Any, **more: Any) -> Any:
            method, train = local_sgd(ft_manager.manager, every=2)
            method.__exit__(None, None, None)  # torchtitan enters it after it was made
            trains.append(train)
            return method

        method = attached(original)(None, ft_manager=ft_manager)
        assert ft_manager.semi_sync.every == 2
        with method:
            trains[0]()
            trains[0]()
        assert manager.calls == ["step", "step", "quorum", "commit"]

    def test_other_methods_are_left_alone(self) -> None:
        import contextlib

        from launcher.train.semi_sync import attached

        nothing = contextlib.nullcontext()
        ft_manager = types.SimpleNamespace()
        assert attached(lambda *a, **k: nothing)(None, ft_manager=ft_manager) is nothing
        assert not hasattr(ft_manager, "semi_sync")

    def test_few_signs_and_a_period_that_is_too_long_is_said(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from torchtitan.tools.logging import logger

        from launcher.train import semi_sync

        logger.addHandler(caplog.handler)
        clock = [100.0]
        monkeypatch.setattr("launcher.train.semi_sync.time.monotonic", lambda: clock[0])
        told: list[dict[str, Any]] = []
        pace = semi_sync.Pace(lambda kind, **fields: told.append(fields), quorum_timeout=60)
        pace.joining()
        for step in range(1, 21):
            clock[0] += 0.5
            pace.step(step, every=100)
        logger.removeHandler(caplog.handler)
        assert [f.get("titan_step") for f in told] == [None, 1, 2, 3, 7, 11, 15, 19]
        assert "two syncs are about 50 s apart" in caplog.text
        assert "TORCHFT_QUORUM_TIMEOUT_SEC to 100" in caplog.text


class TestFragments:
    """Upstream cuts only llama3_ft into fragments, and leaves others whole in silence."""

    def test_upstream_is_wrong(self) -> None:
        import torchtitan.protocols.train_spec as train_spec

        assert not hasattr(train_spec.get_train_spec("qwen3"), "fragment_fn")

    @pytest.mark.parametrize("name", ["qwen3", "llama3_ft"])
    def test_corrected(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchtitan.protocols.train_spec as train_spec
        from torchtitan.components.ft.diloco import fragment_llm
        from torchtitan.config import JobConfig

        from launcher.train.spec import adapt

        monkeypatch.setattr(train_spec, "_extra_train_specs", {})
        config = JobConfig()
        config.model.name = name
        before = train_spec.get_train_spec(name)
        adapt(config)
        adapted = train_spec.get_train_spec(name)
        assert adapted.fragment_fn is fragment_llm
        assert adapted.model_cls is before.model_cls
        assert adapted.build_dataloader_fn is before.build_dataloader_fn


def test_torchtitan_counts_the_batch_over_all_replica_groups() -> None:
    """What ``launcher.batches`` says of ``training.global_batch_size``."""
    from launcher.train.trainer import ReplicaFTManager

    manager = ReplicaFTManager.__new__(ReplicaFTManager)
    manager._manager, manager.group_size, manager.replica_id = object(), 4, 1
    assert manager.get_dp_info(8, 3) == (32, 11)


class TestPatience:
    """Why the lighthouse of a semi-sync run waits so long for groups that live."""

    def quorum(self, join_timeout_ms: int) -> list[str]:
        """Who is in the quorum when a group has waited to join, and one is a little slower."""
        import contextlib
        import threading
        import time
        from datetime import timedelta

        from torchft.coordination import LighthouseClient, LighthouseServer

        lighthouse = LighthouseServer(
            bind="[::]:0",
            min_replicas=1,
            join_timeout_ms=join_timeout_ms,
            quorum_tick_ms=20,
            heartbeat_timeout_ms=20_000,
        )
        found: dict[str, list[str]] = {}

        def client() -> Any:
            return LighthouseClient(lighthouse.address(), connect_timeout=timedelta(seconds=5))

        def ask(name: str) -> None:
            with contextlib.suppress(TimeoutError, RuntimeError):  # one that is left out waits on
                quorum = client().quorum(name, timedelta(seconds=4), address="x", store_address="y")
                found[name] = sorted(member.replica_id for member in quorum.participants)

        try:
            heart, asking = client(), {}
            for names, pause in ((["new"], 1.0), (["a", "b"], 0.4), (["slow"], 0.1)):
                for name in ("new", "a", "b", "slow"):
                    heart.heartbeat(name)
                for name in names:
                    asking[name] = threading.Thread(target=ask, args=(name,))
                    asking[name].start()
                time.sleep(pause)
            for thread in asking.values():
                thread.join(20)
            return found["a"]
        finally:
            lighthouse.shutdown()

    def test_a_group_that_waits_to_join_uses_up_the_patience_for_slower_ones(self) -> None:
        assert self.quorum(800) == ["a", "b", "new"], "0.4 s after the others, and left out"
        assert self.quorum(60_000) == ["a", "b", "new", "slow"]
