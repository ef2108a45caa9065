"""Does things to processes of a run, on the node where they are: ``python -m launcher.hands``.

A drill runs it, here or through ``srun --overlap``. A process is touched only when its environment
says that it is of that run: process ids are given out anew. Says ``done: …``, or why not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launcher.process import still_runs

if TYPE_CHECKING:
    import psutil

#: Bytes that a process whose memory ends still gets.
HEADROOM = 64 << 20
#: Seconds between two changes of a process that is slowed down.
DUTY = 0.25
#: Signals that end a slow-down early.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Signals that a rank only takes when the run was submitted for drills.
HOOKED = (signal.SIGUSR1, signal.SIGUSR2)
#: Seconds for the lighthouse to reach the manager that it is to kill, below those of a drill's step.
RPC_SECONDS = 25.0
_RESOURCES = {"AS": resource.RLIMIT_AS, "FSIZE": resource.RLIMIT_FSIZE}


class HandsError(Exception):
    """It cannot be done; one line."""


def of_run(pid: int, run: str) -> bool:
    """Whether process ``pid`` runs here and was started for a rank of the run in folder ``run``.

    A spare is told which group it is when it runs already: its folder is the run's, too.
    """
    marks = (os.fsencode(f"TFT_EVENTS={run}/"), os.fsencode(f"TFT_FAILURES={run}/"))
    return any(value.startswith(marks) for value in _environment(pid))


def whole_task(pid: int) -> list[int]:
    """Every process of the array task that rank ``pid`` is of, on this node, its launcher first."""
    import psutil

    top = psutil.Process(pid)
    task = _task(pid)
    while (parent := top.parent()) is not None and parent.name() != "slurmstepd":
        if not task or _task(parent.pid) != task:
            break
        top = parent
    found = [top, *top.children(recursive=True)]
    for launcher in _launchers(pid):  # of a group of several nodes it is not above the rank
        if launcher not in found:
            found = [launcher, *launcher.children(recursive=True), *found]
    return [process.pid for process in found]


def _launchers(pid: int) -> Iterator[psutil.Process]:
    """Launchers of the array task that rank ``pid`` is of, on its node."""
    import psutil

    node = [value for value in _environment(pid) if value.startswith(b"SLURMD_NODENAME=")]
    task = _task(pid)
    for process in psutil.process_iter() if node and task else ():
        with contextlib.suppress(psutil.Error):
            ours = process.cmdline()[-2:] == ["launcher.task", "replica"]
            if ours and _task(process.pid) == task and node[0] in _environment(process.pid):
                yield process


def _task(pid: int) -> list[bytes]:
    names = (b"SLURM_ARRAY_JOB_ID=", b"SLURM_ARRAY_TASK_ID=")
    return sorted(value for value in _environment(pid) if value.startswith(names))


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _chosen(options: argparse.Namespace) -> list[int]:
    """The processes that are meant; those that are gone need nothing done."""
    pids = [pid for pid in options.pid if of_run(pid, options.run)]
    if options.whole_task:
        return [one for pid in pids for one in whole_task(pid)]
    return pids


def send(options: argparse.Namespace) -> str:
    number = signal.Signals[f"SIG{options.what}"]
    pids = _chosen(options)
    if number in HOOKED:
        deaf = [pid for pid in pids if b"TFT_DRILLS=1" not in _environment(pid)]
        if deaf:
            raise HandsError("the run was not submitted with TFT_DRILLS=1: its ranks do not listen")
    if not pids and number is not signal.SIGCONT:
        raise HandsError(f"no process of {options.run} with these ids is on {os.uname().nodename}")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return f"{number.name} to {len(pids)} processes"


def limit(options: argparse.Namespace) -> str:
    which, pids = _RESOURCES[options.what], _chosen(options)
    if not pids and not options.free:
        raise HandsError(f"no process of {options.run} with these ids is on {os.uname().nodename}")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(pid, which)
            soft = hard if options.free else 0
            if options.what == "AS" and not options.free:
                soft = _size(pid) + HEADROOM
            resource.prlimit(pid, which, (soft, hard))
    return (
        f"{options.what} of {len(pids)} processes is {'free again' if options.free else 'limited'}"
    )


def _size(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def slow(options: argparse.Namespace) -> str:
    """Stop the processes half of the time; they go on however this ends."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in ENDING:
        signal.signal(number, end)
    pids = _chosen(options)
    if not pids:
        raise HandsError(f"no process of {options.run} with these ids is on {os.uname().nodename}")
    until = time.monotonic() + float(options.what)
    try:
        while time.monotonic() < until:
            _each(pids, signal.SIGSTOP)
            time.sleep(DUTY)
            _each(pids, signal.SIGCONT)
            time.sleep(DUTY)
    except KeyboardInterrupt:
        pass
    finally:
        _each(pids, signal.SIGCONT)
    return f"{len(pids)} processes were slow"


def _each(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def lighthouse(options: argparse.Namespace) -> str:
    """Send a signal to the lighthouse of that supervisor."""
    number = signal.Signals[f"SIG{options.what}"]
    supervisor = _supervisor(options)
    found = list(lighthouses(supervisor))
    if not found and number is not signal.SIGCONT:
        raise HandsError(f"the supervisor {supervisor} has no lighthouse just now")
    _each(found, number)
    return f"{number.name} to {len(found)} processes"


def supervisor(options: argparse.Namespace) -> str:
    """Send a signal to the lighthouse's supervisor."""
    number = signal.Signals[f"SIG{options.what}"]
    _each([_supervisor(options)], number)
    return f"{number.name} to the supervisor"


def _supervisor(options: argparse.Namespace) -> int:
    (pid,) = options.pid
    if not still_runs(pid, options.started):
        raise HandsError(f"process {pid} is not the lighthouse's supervisor any more")
    return int(pid)


def lighthouses(supervisor: int) -> Iterator[int]:
    """Lighthouse processes of that supervisor."""
    import psutil

    for child in psutil.Process(supervisor).children():
        with contextlib.suppress(psutil.Error):
            line = child.cmdline()
            ours = any(word.endswith("lighthouse_process.py") for word in line[:3])
            if ours and "--raise-past" not in line:
                yield child.pid


def rpc(options: argparse.Namespace) -> str:
    """Ask the lighthouse to have a member of its quorum killed."""
    url = f"{options.what}/replica/{options.member}/kill"
    request = urllib.request.Request(url, method="POST")  # noqa: S310 - the lighthouse's address
    try:
        urllib.request.urlopen(request, timeout=RPC_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        said = error.read(400).decode(errors="replace")
        error.close()
        if "failed to find replica" in said:
            raise HandsError(f"the lighthouse knows no {options.member}") from None
        # It answers 500 on success: the one that is killed cannot answer.
    except OSError as error:
        raise HandsError(
            f"{options.what} does not answer ({error}): perhaps it cannot reach the group's manager, "
            "whose address has the node's host name"
        ) from None
    return f"kill request for {options.member}"


_ACTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "signal": send,
    "limit": limit,
    "slow": slow,
    "lighthouse": lighthouse,
    "supervisor": supervisor,
    "rpc": rpc,
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launcher.hands")
    parser.add_argument("act", choices=list(_ACTS))
    parser.add_argument("what", help="signal, resource, seconds or address")
    parser.add_argument("member", nargs="?", default="")
    parser.add_argument("--run", default="/nonexistent")
    parser.add_argument("--pid", type=int, action="append", default=[])
    parser.add_argument("--started", type=float, default=0.0)
    parser.add_argument("--whole-task", action="store_true")
    parser.add_argument("--free", action="store_true")
    options = parser.parse_args(words)
    try:
        print(f"done: {_ACTS[options.act](options)}", flush=True)
    except (HandsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
