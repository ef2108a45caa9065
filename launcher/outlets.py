"""The sinks that a person asks for: JSON lines, a webhook, and which others there are."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import wandb_sink
from launcher.findings import Severity
from launcher.model import KitError, UsageError
from launcher.rundir import RunDir
from launcher.sinks import Delivery, Sink, Update
from launcher.snapshot import incident_as_data, iso

#: Seconds for one message to the webhook, and how often it is tried.
WEBHOOK_SECONDS, WEBHOOK_TRIES = 5.0, 2
#: Seconds in which the same thing is said to the webhook only once.
COOLDOWN = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Which sinks are wanted."""

    events_to: Path | None = None
    prometheus: str = ""
    webhook: str = field(default="", repr=False)
    """A secret: who knows it can write to the channel."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where W&B is settled."""

    def open(self, run: RunDir, *, say: Callable[[str], None]) -> Delivery:
        """Open them all.

        Raises:
            UsageError: one of them cannot be opened as it was asked for.
        """
        sinks: list[Sink] = []
        if self.webhook:
            sinks.append(Webhook(self.webhook, run.name))
        if self.events_to is not None:
            sinks.append(JsonLines(self.events_to, run.name))
        if self.prometheus:
            # Imported when used: its start-up work is for those who want it.
            from launcher.prometheus import Prometheus

            endpoint = Prometheus(self.prometheus)
            say(f"metrics for Prometheus on port {endpoint.port}")
            sinks.append(endpoint)
        if wandb_sink.wanted(self.env):
            controller = wandb_sink.open_controller(run, self.env)
            say(
                f"W&B run {controller.run_id} in group {run.name}"
                if controller is not None
                else "W&B: another monitor of this run already logs there"
            )
            sinks += [] if controller is None else [controller]
        return Delivery(sinks)

    @contextlib.contextmanager
    def delivering(self, run: RunDir, *, say: Callable[[str], None]) -> Iterator[Delivery]:
        """Open the outlets, and close them at the end, saying what could not be delivered.

        Raises:
            UsageError: one of them cannot be opened.
        """
        delivery = self.open(run, say=say)
        try:
            yield delivery
        finally:
            for text in delivery.close():
                say(text)


class JsonLines:
    """Every notice, and every change of an incident or finding, as a JSON line in a file."""

    name = "events file"

    def __init__(self, path: Path, run: str) -> None:
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--events-to {path}: {error.strerror}; give another file") from error
        # A monitor tells the story from its start: what follows may have been told before.
        self._write([{"t": iso(time.time()), "kind": "monitor", "run": run}])

    def deliver(self, update: Update) -> None:
        changed = [("appeared", f) for f in update.appeared] + [("gone", f) for f in update.gone]
        self._write(
            [
                *({"t": iso(n.t), "kind": "notice", "text": n.text} for n in update.notices),
                *(
                    {"t": iso(update.t), **incident_as_data(i), "kind": "incident"}
                    for i in update.incidents
                ),
                *(
                    {
                        "t": iso(update.t),
                        "kind": "finding",
                        "change": change,
                        "finding": finding.kind,
                        "severity": finding.severity.value,
                        "replica": finding.replica,
                        "message": finding.message,
                    }
                    for change, finding in changed
                ),
            ]
        )

    def close(self) -> None:
        self._file.close()

    def _write(self, events: list[dict[str, Any]]) -> None:
        try:
            self._file.writelines(json.dumps(event, allow_nan=False) + "\n" for event in events)
            self._file.flush()
        except OSError as error:
            raise KitError(str(error.strerror)) from error


class Webhook:
    """Losses, recoveries, critical findings and an early end as ``{"text": …}``, as Slack takes it."""

    name = "webhook"

    def __init__(
        self,
        url: str,
        run: str,
        *,
        cooldown: float = COOLDOWN,
        timeout: float = WEBHOOK_SECONDS,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
            raise UsageError(
                "the webhook (--webhook, TFT_WEBHOOK) is not an http(s) address; it is a secret "
                "and not shown here"
            )
        self._url = url
        self._run = run
        self._cooldown = cooldown
        self._timeout = timeout
        self._sent: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def deliver(self, update: Update) -> None:
        problem: KitError | None = None
        for key, text in _messages(update):
            if update.t - self._sent.get(key, float("-inf")) < self._cooldown:
                self._held[key] += 1
                continue
            held = self._held.pop(key, 0)
            more = f" ({held} more of these were held back before)" if held else ""
            self._sent[key] = update.t
            try:
                self._post(f"{self._run}: {text}{more}")
            except KitError as error:
                problem = error
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Nothing is kept open."""

    def _post(self, text: str) -> None:
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self._url,
            data=json.dumps({"text": text}).encode(),
            headers={"Content-Type": "application/json"},
        )
        problem = ""
        for _ in range(WEBHOOK_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout):  # noqa: S310
                    return
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                error.close()
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
            except OSError as error:
                # The texts of these may hold the address.
                reason = getattr(error, "reason", error)
                problem = type(reason).__name__
        raise KitError(problem)


def _messages(update: Update) -> list[tuple[str, str]]:
    """What is worth a message, each with the key of its cooldown."""
    there = f"{len(update.members)} of {update.group_size} replica groups are in the quorum"
    found = []
    for i in update.lost:
        where = f" on {i.where}" if i.where else ""
        text = f"{i.who} LOST{where} at step {i.lost_at_step}: {i.why}; {there}"
        found.append((f"lost:{i.replica}", text))
    for i in update.recovered:
        text = f"{i.who} RECOVERED at step {i.recovered_at_step}; {there}"
        found.append((f"recovered:{i.replica}", text))
    for f in update.appeared:
        if f.severity is Severity.CRITICAL:
            found.append((f.key, f"CRITICAL {f.kind}: {f.message}"))
    if update.ended:
        found.append(("ended", update.ended))
    return found
