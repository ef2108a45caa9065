"""What a lighthouse has published of itself.

A lighthouse is found through files on the shared file system, one folder for each
(``outputs/torchft/lighthouses/<host>-<port>/``). One lighthouse serves one run: two
runs on it would form one quorum of different models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.files import create_once, overwrite, read_json, replace
from launcher.model import BlindError, KitError, UsageError
from launcher.process import still_runs
from launcher.reach import split
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import Scheduler, scheduler_of
from launcher.slurm import Job
from launcher.timeouts import DEFAULT

#: Seconds after which a left-over claim lock is taken to be a dead process's.
STALE_LOCK = 90.0
#: Quorum ids beyond which a number that was kept is not believed: a month of one a second.
MOST_QUORUMS = 3_000_000
#: Seconds that the tasks of a cancelled run get to end before their lighthouse is refused.
COMPLETING_PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A published lighthouse (``address.json``)."""

    url: str
    host: str
    """Host name of the machine it runs on."""
    port: int
    pid: int
    """Process id of its supervisor there."""
    process_started: float
    """Start time of that process, Unix seconds: process ids are reused."""
    user: str
    started: float
    with_run: bool = False
    """Whether it ends with the run that it serves."""
    serving: str = ""
    """``host:port`` of the lighthouse's own process, new at every start of it; ``url`` is the
    supervisor's, which stays. Empty: the same."""
    answers_votes: bool = False
    """Whether its supervisor knows of votes for a stand-in (``launcher/terms.py``)."""
    past: int = 0
    """Quorum id that it was brought past when it was started."""
    min_replicas: int = 1
    heartbeat_timeout_ms: int = DEFAULT.heartbeat_timeout_ms
    quorum_tick_ms: int = DEFAULT.quorum_tick_ms
    join_timeout_ms: int = 0
    """How long it waits for groups that live and have not joined; 0: not known."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Address:
        """An address as it was published; what a newer version says beyond it is left out.

        Raises:
            UsageError, TypeError, ValueError: it is none.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        address = cls(**{key: value for key, value in raw.items() if key in known})
        split(address.url)
        return dataclasses.replace(
            address, pid=int(address.pid), process_started=float(address.process_started)
        )


class LighthouseDir:
    """The files of one lighthouse."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "lighthouse.log"
        self.supervisor_log = path / "supervisor.log"
        self.label = ":".join(path.name.rsplit("-", 1))
        """``host:port``, for people."""

    @classmethod
    def of(cls, outputs: Outputs, url: str) -> LighthouseDir:
        host, port = split(url)
        return cls(outputs.lighthouses / f"{host}-{port}")

    @classmethod
    def of_run(cls, run: RunDir, manifest: Manifest) -> LighthouseDir:
        """The lighthouse that a run was started on, wherever it is now."""
        outputs = Outputs(run.path.parent.parent)
        if manifest.lighthouse_name:
            return cls(outputs.lighthouses / manifest.lighthouse_name)
        return cls.of(outputs, manifest.lighthouse)

    def whereabouts(self, url: str) -> tuple[str, int] | None:
        """Host and port of the lighthouse's process; ``url``'s own where nothing is published.
        None when that cannot be read just now."""
        try:
            address = self.address()
            if address is None:
                return split(url)
            return split(f"http://{address.serving}" if address.serving else address.url)
        except KitError:
            return None

    @property
    def _state(self) -> Path:
        return self.path / "state.json"

    def newest_quorum_id(self) -> int:
        """Highest quorum id that a lighthouse of this folder has given out; 0 for none."""
        with contextlib.suppress(KitError, ValueError, TypeError):
            known = int((read_json(self._state) or {}).get("quorum_id", 0))
            if 0 <= known < MOST_QUORUMS:
                return known
        # Damaged: what the log of the run says, as far as it is kept.
        log = self._run(self.claimed_by() or 0).lighthouse_log
        found = [0]
        for name in (log.name, f"{log.name}.full", f"{log.name}.1"):
            with contextlib.suppress(OSError):
                kept = log.with_name(name).read_bytes()
                found += map(int, re.findall(rb"Quorum! Quorum \{ quorum_id: (\d{1,15}),", kept))
        return min(max(found), MOST_QUORUMS)

    def remember_quorum_id(self, quorum_id: int) -> None:
        """Keep it for the next lighthouse, on whatever host.

        Raises:
            OSError: it cannot be written.
        """
        overwrite(self._state, json.dumps({"quorum_id": quorum_id}) + "\n")

    def _run(self, array_job_id: int) -> RunDir:
        return Outputs(self.path.parent.parent.parent).run_of_array(array_job_id)

    @property
    def _address(self) -> Path:
        return self.path / "address.json"

    @property
    def _claim(self) -> Path:
        return self.path / "claim.json"

    def publish(self, address: Address) -> None:
        try:
            overwrite(self._address, json.dumps(asdict(address), indent=2) + "\n")
        except OSError as error:
            raise KitError(f"cannot write {self._address}: {error.strerror}") from error

    def unpublish(self, pid: int) -> None:
        """Withdraw the address, if it is (still) the one of supervisor ``pid``."""
        with contextlib.suppress(KitError, FileNotFoundError):
            address = self.address()
            if address is not None and address.pid == pid:
                self._address.unlink()

    def address(self) -> Address | None:
        raw = read_json(self._address)
        try:
            if raw is None:
                return None
            return Address.of(raw)
        except (TypeError, ValueError, UsageError) as error:
            raise KitError(
                f"{self._address} is not a lighthouse's address: delete it ({error})"
            ) from error

    def claimed_by(self) -> int | None:
        """Array job id of the run that this lighthouse serves, or served last."""
        raw = read_json(self._claim)
        try:
            return None if raw is None else int(raw["array_job_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise KitError(f"{self._claim} is not a claim: delete it ({error!r})") from error

    def release(self, array_job_id: int) -> None:
        """Give up the claim of a run that did not start after all."""
        with contextlib.suppress(KitError):
            if self.claimed_by() == array_job_id:
                self._claim.unlink(missing_ok=True)

    def release_if_ended(self, slurm: Scheduler) -> None:
        """Forget the run served last, when Slurm says that it has ended."""
        with contextlib.suppress(KitError):
            run = self.claimed_by()
            if run is not None and not any(job.live for job in self._jobs(run, slurm)):
                self._claim.unlink(missing_ok=True)

    def claim(self, array_job_id: int, slurm: Scheduler) -> None:
        """Make this lighthouse serve the run of ``array_job_id``.

        Raises:
            UsageError: it serves another run that is still in Slurm's queue.
            BlindError: it served another run, and Slurm cannot be asked whether that ended.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"array_job_id": array_job_id, "claimed": time.time()}) + "\n"
        if self.claimed_by() == array_job_id or create_once(self._claim, content):
            return
        with self._lock():
            other = self.claimed_by()
            if other is not None and other != array_job_id and self._in_queue(other, slurm):
                raise UsageError(
                    f"the lighthouse {self.label} already serves run tft-{other}, which is "
                    "still in the queue: two runs on one lighthouse would train as one. Wait for "
                    f"it, `scancel {other}`, or start a second lighthouse (`python -m launcher "
                    "lighthouse up --port 29511`) and set TORCHFT_LIGHTHOUSE to its address"
                )
            replace(self._claim, content)

    def _in_queue(self, array_job_id: int, slurm: Scheduler) -> bool:
        """Whether tasks of a run may still run; one that is just ending is waited for."""
        deadline = time.monotonic() + COMPLETING_PATIENCE
        while live := [job for job in self._jobs(array_job_id, slurm) if job.live]:
            if any(job.state != "COMPLETING" for job in live) or time.monotonic() > deadline:
                return True
            time.sleep(1.0)
        return False

    def _jobs(self, array_job_id: int, slurm: Scheduler) -> list[Job]:
        run = self._run(array_job_id)
        return scheduler_of(run, slurm).jobs(*run.arrays())

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Mutual exclusion over the shared file system: making a folder is atomic there."""
        lock = self.path / "claim.lock"
        deadline = time.monotonic() + STALE_LOCK
        while True:
            try:
                lock.mkdir()
                break
            except FileExistsError:
                with contextlib.suppress(OSError):
                    if time.time() - lock.stat().st_mtime > STALE_LOCK:
                        lock.rmdir()
                        continue
                if time.monotonic() > deadline:
                    raise KitError(f"{lock} is held; remove it if no task is starting") from None
                time.sleep(0.1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.rmdir()


def discover(outputs: Outputs, by_hand: str, run: int = 0) -> tuple[str, LighthouseDir]:
    """URL and folder of the lighthouse to use: the one set by hand, else the one published.

    (One that is named after a run is that run's own, and so is one that ends with another run.)

    Args:
        run: array job id of the run that asks.

    Raises:
        UsageError: none is published, or several are.
    """
    published = [
        (address.url, folder)
        for path in sorted(outputs.lighthouses.glob("*/address.json"))
        if (address := (folder := LighthouseDir(path.parent)).address()) is not None
    ]
    if by_hand:
        known = [folder for url, folder in published if url == by_hand]
        return by_hand, known[0] if known else LighthouseDir.of(outputs, by_hand)
    published = [(url, at) for url, at in published if not _is_anothers(at, run)]
    if len(published) == 1:
        return published[0]
    if published:
        urls = ", ".join(url for url, _ in published)
        raise UsageError(
            f"several lighthouses are published ({urls}): set TORCHFT_LIGHTHOUSE to the one to use"
        )
    raise UsageError(
        f"no lighthouse is published under {outputs.lighthouses}: run "
        "`python -m launcher lighthouse up --detach` on the login node, or set TORCHFT_LIGHTHOUSE"
    )


def _is_anothers(folder: LighthouseDir, run: int) -> bool:
    if re.fullmatch(r"tft-\d+", folder.path.name):
        return True
    address = folder.address()
    with_run = address is not None and address.with_run
    return with_run and folder.claimed_by() not in (None, run)


def alive(address: Address) -> bool:
    """Whether the supervisor of ``address`` runs on this machine.

    Raises:
        BlindError: it was started on another machine, which cannot be seen from here.
    """
    if address.host != socket.gethostname():
        raise BlindError(
            f"the lighthouse {address.url} was started on {address.host} and can only be seen and "
            f"ended there (this is {socket.gethostname()}); if that machine is gone, delete its "
            "folder below outputs/torchft/lighthouses"
        )
    return still_runs(address.pid, address.process_started)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll ``condition`` for at most ``seconds``; its last answer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return condition()
        time.sleep(0.05)
    return True
