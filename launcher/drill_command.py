"""The drill commands: finds the run, asks before it breaks something, and hands over."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.drill import aimed_at, dry_run, run_drill
from launcher.drills import KINDS, OPERATOR, Kind, Target
from launcher.events import Event, ReplicaEventReader
from launcher.inject import Injector, aim, shown
from launcher.lighthouse import LighthouseDir, alive
from launcher.model import BlindError, CriticalError, KitError, UsageError
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import Scheduler, scheduler_of
from launcher.soak import run_soak, schedule
from launcher.state import RunState
from launcher.watcher import Watcher

#: Asks a person; None: nobody is there to be asked.
Ask = Callable[[str], bool | None]
#: Exit code of a drill that was interrupted.
INTERRUPTED = 130
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What one drill and a soak have in common."""

    outputs: Path
    name: str | None
    """Run name or array job id; None: the newest."""
    env: Mapping[str, str]
    say: Callable[[str], None]
    ask: Ask | None
    """None: do not ask."""
    dry: bool
    patience: float
    """Stretches every deadline."""
    seconds: float
    """How long what lasts a while lasts."""
    partition: str
    """For ``preempt``."""


def one_drill(setting: Setting, kind: Kind, *, replica: int | None, node: str, rank: int) -> None:
    """Do one drill.

    Raises:
        CriticalError: it failed.
        UsageError: it is refused.
        BlindError: the run cannot be seen.
    """
    run, manifest, slurm = _run(setting)
    say = setting.say
    with Watcher.of_run(run, slurm) as watcher:
        state = _looked(watcher)
        aim_now = partial(
            aim, kind, run, manifest, state, slurm, setting.env,
            replica=replica, node=node, rank=rank,
            seconds=setting.seconds, partition=setting.partition,
        )  # fmt: skip
        target = aim_now()
        if setting.dry:
            for text in dry_run(kind, target, commands):
                say(text)
            return
        confirm([kind], f"{kind.name} on {aimed_at(kind, target)}", setting.ask, say)
        with _interruptible(say):
            run_drill(kind, aim_now, watcher, Injector(slurm, say), say, setting.patience)


def soak(
    setting: Setting,
    kinds: Sequence[str],
    *,
    count: int,
    mtbf: str,
    seed: int,
    max_down: int,
    json_file: Path | None,
) -> None:
    """Do many drills, and report on them; raises what `one_drill` does."""
    run, manifest, slurm = _run(setting)
    say, size = setting.say, manifest.group_size
    mean = duration(mtbf)
    planned = schedule(kinds, count=count, mtbf=mean, seed=seed, size=size)
    if max_down >= size:
        raise UsageError(f"--max-down must leave one of {size} replica groups to heal from")
    if setting.dry:
        for one in planned:
            say(f"after {one.wait:6.1f} s  {one.kind:<17}  replica {one.replica}")
        return
    asked_about = f"{count} failures ({', '.join(kinds)}) in {run.name}"
    confirm([KINDS[kind] for kind in kinds], asked_about, setting.ask, say)
    with Watcher.of_run(run, slurm) as watcher:
        state = _looked(watcher)

        def aim_at(kind: Kind, replica: int) -> Target:
            return aim(
                kind, run, manifest, state, slurm, setting.env,
                replica=replica, seconds=setting.seconds, partition=setting.partition,
            )  # fmt: skip

        for kind in dict.fromkeys(kinds):
            aim_at(KINDS[kind], 0)  # what cannot be done here is refused at once
        with _interruptible(say):
            result = run_soak(
                planned,
                watcher,
                Injector(slurm, say),
                aim_at,
                say,
                seed=seed,
                mtbf=mean,
                max_down=max_down,
                patience=setting.patience,
                supervisor=_supervisor(run, manifest),
                launches=partial(launches_and_actions, run, size),
            )
    say("")
    for text in result.lines():
        say(text)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_data(), indent=1) + "\n")
    if not result.passed:
        raise CriticalError("the soak failed: see the report")


@contextlib.contextmanager
def _interruptible(say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted: what was changed is put back")
        raise SystemExit(INTERRUPTED) from None


def confirm(kinds: Sequence[Kind], what: str, ask: Ask | None, say: Callable[[str], None]) -> None:
    """Ask before something is broken on purpose.

    Raises:
        UsageError: nobody may be asked and it touches whole nodes, or the answer is no.
    """
    for kind in kinds:
        if kind.rights.startswith(OPERATOR):
            say(f"{kind.name} needs the rights of {kind.rights}")
    if ask is None:
        return
    answer = ask(f"Break it on purpose: {what}?")
    if answer is None and any(kind.whole_node for kind in kinds):
        names = ", ".join(kind.name for kind in kinds if kind.whole_node)
        raise UsageError(f"{names} touches a whole node, and nobody is here to ask: add --yes")
    if answer is False:
        raise UsageError("nothing was done")


def commands(kind: Kind, target: Target) -> list[str]:
    """What a drill runs, in its order, as one would type it."""
    lines = ["to break it:", *(f"  $ {shown(step)}" for step in kind.steps(target))]
    if restore := kind.restore(target):
        when = f"when {kind.restore_after.value}" if kind.restore_after else "at the end"
        lines += [f"to put it back ({when}, and when interrupted):"]
        lines += [f"  $ {shown(s)}{' (if it has ended)' if s.if_ended else ''}" for s in restore]
    return lines


def duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``1.5m`` or ``1h``.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a time such as 60s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def launches_and_actions(run: RunDir, size: int) -> list[Event]:
    """Every start of a replica group, and everything the guardian did, from the run's files."""
    found = []
    for path in [*(run.events(replica) for replica in range(size)), run.guardian_events]:
        if path.is_file():
            reader = ReplicaEventReader(path.name)
            found += [
                e for e in reader.read(0, path.read_bytes()) if e.kind in ("launch", "action")
            ]
    return found


def _run(setting: Setting) -> tuple[RunDir, Manifest, Scheduler]:
    run = Outputs(setting.outputs).find(setting.name)
    return run, run.manifest(), scheduler_of(run)


def _looked(watcher: Watcher) -> RunState:
    """The state of a run, read once to its end.

    Raises:
        BlindError: a source cannot be read.
        UsageError: it is over.
    """
    watcher.look(final=True)
    if watcher.blind:
        raise BlindError("; ".join(f"{name}: {why}" for name, why in watcher.blind.items()))
    if watcher.state.finished or watcher.live_tasks == 0:
        raise UsageError("the run is over: there is nothing to break")
    return watcher.state


def _supervisor(run: RunDir, manifest: Manifest) -> int:
    """Process id of the lighthouse's supervisor; 0 when it is not on this machine."""
    try:
        address = LighthouseDir.of_run(run, manifest).address()
        return address.pid if address is not None and alive(address) else 0
    except KitError:
        return 0
