"""How replica groups learn together: per step (hsdp, ddp), or every so many steps. Pure.

A method is chosen by ``TFT_METHOD``. What it asks of torchtitan it gives as flags, for what the
config file does not say; the user's own flags come after them and win. The names and defaults are
those of torchtitan 0.2.2 (``components/ft/config/job_config.py``), the rules those of torchft
(``local_sgd.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.batches import Batches, Layout
from launcher.titan import in_file, setting, switch, whole

_SECTION = "fault_tolerance"
#: Without it torchtitan does not know the settings of semi-sync methods.
_CONFIG_MODULE = "torchtitan.components.ft.config"
#: torchtitan's own default of ``sync_steps``.
_TITAN_SYNC_STEPS = 5
#: Compute capability from which a GPU has FP8 (torchft's ``quantization.py``).
FP8_CAPABILITY = (9, 0)
#: Groups from which a quorum can leave a slow one out: it needs more than half of them.
FEW_GROUPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to learn together."""

    name: str
    meaning: str
    semi_sync: str = ""
    """torchtitan's name of it; empty when gradients are averaged at every step."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of ``fault_tolerance``, where nobody says another value."""
    quorum_timeout: int = 600
    """``TORCHFT_QUORUM_TIMEOUT_SEC`` where it is not set, seconds. With a semi-sync method a group
    may wait for the whole time between two syncs."""
    join_timeout_ms: int = 10_000
    """How long the lighthouse should wait for groups that live and have not joined yet."""

    @property
    def environment(self) -> dict[str, str]:
        """Of a replica group, where it is not set: it asks twice a second."""
        if not self.semi_sync:
            return {}
        return {
            "TORCHFT_QUORUM_TIMEOUT_SEC": str(self.quorum_timeout),
            "TORCHFT_QUORUM_RETRIES": str(2 * self.quorum_timeout),
        }

    def flags(self, settings: Mapping[str, Any]) -> list[str]:
        """torchtitan's flags, to stand before those of the user."""
        if not self.semi_sync:
            return []
        wanted = {"semi_sync_method": self.semi_sync, **self.settings}
        flags = [
            f"--{_SECTION}.{key}={value}"
            for key, value in wanted.items()
            if in_file(settings, _SECTION, key) is None
        ]
        if in_file(settings, "job", "custom_config_module") is None:
            flags.append(f"--job.custom_config_module={_CONFIG_MODULE}")
        return flags


#: An hour: torchft's own advice for LocalSGD and DiLoCo (``Manager``'s ``quorum_timeout``). The
#: lighthouse waits as long for who lives: it would leave a slower group out, whose steps since the
#: last sync would be lost. One that is hung is restarted long before.
_PATIENT = {"quorum_timeout": 3600, "join_timeout_ms": 3_600_000}

HSDP = Method(
    name="hsdp",
    meaning="gradients averaged at every step; the ranks of a group share one model (FSDP)",
)
DDP = Method(
    name="ddp",
    meaning="gradients averaged at every step; a group is one rank with the whole model",
)
#: Steps between two syncs: up to 16 Lin et al. (arXiv:1808.07217) lose no quality.
LOCAL_SGD = Method(
    name="local-sgd",
    meaning="every group trains by itself; all average their weights every sync_steps steps",
    semi_sync="local_sgd",
    settings={"sync_steps": 10},
    **_PATIENT,
)
#: Steps between two syncs: those of the Streaming DiLoCo paper (arXiv:2501.18512).
DILOCO = Method(
    name="diloco",
    meaning="every group trains by itself; an outer optimizer takes all groups' changes every "
    "sync_steps steps, in one piece or in fragments",
    semi_sync="diloco",
    settings={"sync_steps": 100},
    **_PATIENT,
)
METHODS = {method.name: method for method in (HSDP, DDP, LOCAL_SGD, DILOCO)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When the groups of a semi-sync method meet, and with what."""

    sync_steps: int
    """Steps in which the whole model is synced once."""
    fragments: int = 1
    delay: int = 0
    """Steps that a sync of a fragment may overlap with training."""
    alpha: float = 0.0
    """Part of a group's own weights that it keeps at a sync."""
    quantize: bool = False

    @property
    def every(self) -> int:
        """Steps between two syncs of anything."""
        return max(1, self.sync_steps // max(1, self.fragments))


def resolve(name: str, settings: Mapping[str, Any], extra: Sequence[str]) -> Method:
    """The method that a run has: ``TFT_METHOD``, else what the configuration asks for itself.

    Args:
        name: of ``METHODS``; empty when none was chosen.

    Raises:
        ValueError: the configuration asks for another one.
    """
    asked = setting(settings, extra, _SECTION, "semi_sync_method")
    asked = "" if asked in (None, "None") else str(asked).lower()
    by_config = {method.semi_sync: method for method in METHODS.values() if method.semi_sync}
    if asked and asked not in by_config:
        raise ValueError(
            f"{_SECTION}.semi_sync_method must be one of {', '.join(by_config)}, not {asked!r}"
        )
    if name and asked and by_config[asked].name != name:
        raise ValueError(
            f"TFT_METHOD is {name}, and {_SECTION}.semi_sync_method in the configuration is {asked}: "
            "leave one of them out"
        )
    return METHODS[name] if name else by_config.get(asked, HSDP)


def schedule(method: Method, settings: Mapping[str, Any], extra: Sequence[str]) -> Schedule | None:
    """When groups meet; None when they do at every step.

    Args:
        extra: the user's flags.

    Raises:
        ValueError: a setting is not a number; says which.
    """
    if not method.semi_sync:
        return None
    flags = [*method.flags(settings), *extra]
    named = in_file(settings, _SECTION, "module_fqns_per_model_fragment")
    alpha = setting(settings, flags, _SECTION, "fragment_update_alpha")
    try:
        share = 0.0 if alpha is None else float(alpha)
    except (TypeError, ValueError):
        raise ValueError(
            f"{_SECTION}.fragment_update_alpha must be a number, not {alpha!r}"
        ) from None
    return Schedule(
        sync_steps=whole(settings, flags, _SECTION, "sync_steps", _TITAN_SYNC_STEPS),
        fragments=len(named) if named else whole(settings, flags, _SECTION, "num_fragments", 1),
        delay=whole(settings, flags, _SECTION, "fragment_sync_delay", 0),
        alpha=share,
        quantize=bool(switch(settings, flags, _SECTION, "should_quantize")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How a run learns, as far as it is known before it starts."""

    method: Method
    schedule: Schedule | None
    layout: Layout
    steps: int | None
    device: str
    process_group: str
    """``nccl`` or ``gloo``, between replica groups."""
    capability: tuple[int, int] | None = None
    """Lowest compute capability of the node's GPUs; None when it is not known."""
    checkpoint_interval: int | None = None
    """Steps between two checkpoints; None when there are none."""

    def problems(self) -> Iterator[str]:
        """Everything that keeps this method from working, each with what to do."""
        yield from self.layout.problems()
        if self.schedule is None:
            yield from self._per_step()
        else:
            yield from self._semi_sync(self.schedule)

    def _per_step(self) -> Iterator[str]:
        ranks = self.layout.ranks
        if self.method is DDP and ranks != 1:
            yield (
                f"method ddp is one rank a replica group, and this one has {ranks}: one node a group, "
                "submitted with --gpus-per-node=1 (and --oversubscribe for several groups on a node), "
                "or take hsdp"
            )
        elif ranks > 1 and not self.layout.sharded:
            yield (
                f"gradients are averaged over replica groups through FSDP, and a group of {ranks} ranks "
                "with data_parallel_shard_degree 1 has none: set it above 1 (-1 takes all ranks), or "
                "take one rank a replica group"
            )

    def _semi_sync(self, plan: Schedule) -> Iterator[str]:
        every, whole_model = plan.every, plan.sync_steps
        if whole_model < 1 or plan.fragments < 1:
            yield (
                f"sync_steps ({whole_model}) and num_fragments ({plan.fragments}) must be at least 1"
            )
            return
        if self.method is DILOCO:
            yield from self._diloco(plan)
        elif plan.fragments > 1 or plan.delay or plan.alpha or plan.quantize:
            yield (
                "num_fragments, fragment_sync_delay, fragment_update_alpha and should_quantize are for "
                "method diloco; local-sgd would leave them out in silence"
            )
        if self.layout.pipeline > 1:
            yield (
                f"method {self.method.name} syncs one part of the model in each rank, and "
                f"pipeline_parallel_degree {self.layout.pipeline} may make several: set it to 1"
            )
        if self.steps is not None and self.steps % whole_model:
            below = self.steps - self.steps % whole_model
            yield (
                f"training.steps ({self.steps}) must be a multiple of sync_steps ({whole_model}), or "
                f"what is learnt after the last sync stays in each group by itself: "
                f"{below or whole_model} or {below + whole_model}"
            )
        if self.checkpoint_interval is not None and self.checkpoint_interval % every:
            yield (
                f"checkpoint.interval ({self.checkpoint_interval}) must be a multiple of the {every} "
                "steps between two syncs, or a checkpoint holds what one group has learnt by itself"
            )

    def _diloco(self, plan: Schedule) -> Iterator[str]:
        if plan.sync_steps % plan.fragments:
            near = math.ceil(plan.sync_steps / plan.fragments) * plan.fragments
            yield (
                f"sync_steps ({plan.sync_steps}) must be a multiple of num_fragments "
                f"({plan.fragments}), which are synced one after the other: {near}, for example"
            )
        if not 0 <= plan.delay < plan.every:
            yield (
                f"fragment_sync_delay ({plan.delay}) must be less than the {plan.every} steps between "
                "two syncs (sync_steps / num_fragments)"
            )
        if not 0 <= plan.alpha <= 1:
            yield f"fragment_update_alpha ({plan.alpha:g}) must be from 0 to 1"
        if not plan.quantize:
            return
        if self.device == "cpu" or self.process_group != "nccl":
            yield (
                "should_quantize needs CUDA and the process group nccl; elsewhere torchft would leave "
                "it out in silence: set --fault_tolerance.no_should_quantize"
            )
        elif self.capability is None or self.capability < FP8_CAPABILITY:
            has = "it is not known" if self.capability is None else "{}.{}".format(*self.capability)
            yield (
                "should_quantize needs GPUs with FP8 (compute capability 9.0 and up, as H100), and on "
                f"this node {has}: set --fault_tolerance.no_should_quantize"
            )


def lighthouse_problem(method: Method, groups: int, join_timeout_ms: int) -> str:
    """What is wrong with the lighthouse for this method; empty when nothing is.

    Args:
        groups: replica groups of the run.
        join_timeout_ms: what that lighthouse was started with; 0 when it is not known.
    """
    usual = HSDP.join_timeout_ms
    if not method.semi_sync or groups <= FEW_GROUPS or not 0 < join_timeout_ms <= usual:
        return ""
    return (
        f"the lighthouse waits {join_timeout_ms / 1000:g} s for groups that have not joined, and method "
        f"{method.name} needs longer: of {groups} groups that train by themselves, a slower one would be "
        "left out, and what it learnt since the last sync be lost; start the lighthouse with "
        f"TFT_METHOD={method.name} set, or with --join-timeout-ms={method.join_timeout_ms}"
    )


def lines(method: Method, plan: Schedule | None, batches: Batches) -> list[str]:
    """One or two lines for a person, on what a run is about to do."""
    text = f"method {method.name}: {method.meaning}"
    if plan is not None:
        text = f"method {method.name}: a sync every {plan.every} steps"
        if plan.fragments > 1:
            text += f", of one of {plan.fragments} fragments (the whole model in {plan.sync_steps})"
        if plan.delay:
            text += f", overlapping {plan.delay} steps"
        if plan.alpha:
            text += f", keeping {plan.alpha:g} of a group's own weights"
        if plan.quantize:
            text += ", in FP8"
        text += f"; {batches.tokens * plan.every:,} tokens between two syncs"
    return [text, batches.line()]
