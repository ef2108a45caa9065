"""The sinks that a person asks for: JSON lines, a webhook, and which others there are."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import wandb_sink
from launcher.alarms import COOLDOWN, Alarm, Cooldown, Due, alarms
from launcher.findings import Finding
from launcher.model import KitError, UsageError
from launcher.rundir import RunDir
from launcher.sinks import Delivery, Sink, Update
from launcher.snapshot import incident_as_data, iso

#: Seconds for one message to the webhook, and how often it is tried.
WEBHOOK_SECONDS, WEBHOOK_TRIES = 5.0, 2
#: Lines of one message to the webhook.
WEBHOOK_LINES = 30


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


@dataclass(frozen=True, slots=True)
class Change:
    """A finding that appeared or is gone."""

    kind: str
    finding: Finding

    @property
    def subject(self) -> str:
        return self.finding.key


class JsonLines:
    """Every notice, and every change of an incident or finding, as a JSON line in a file.

    Notices and incidents are events, and a record of them is whole: none is held back. A finding
    is a condition, which may come and go at every look: that is written once in a while.
    """

    name = "events file"

    def __init__(self, path: Path, run: str, *, cooldown: float = COOLDOWN) -> None:
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--events-to {path}: {error.strerror}; give another file") from error
        self._cooldown: Cooldown[Change] = Cooldown(cooldown)
        self._t = time.time()
        # A monitor tells the story from its start: what follows may have been told before.
        self._write([{"t": iso(self._t), "kind": "monitor", "run": run}])

    def deliver(self, update: Update) -> None:
        self._t = update.t
        changes = [
            *(Change("appeared", finding) for finding in update.appeared),
            *(Change("gone", finding) for finding in update.gone),
        ]
        self._write(
            [
                *({"t": iso(n.t), "kind": "notice", "text": n.text} for n in update.notices),
                *(
                    {"t": iso(update.t), **incident_as_data(i), "kind": "incident"}
                    for i in update.incidents
                ),
                *map(self._finding, self._cooldown.pass_on(changes, update.t)),
            ]
        )

    def close(self) -> None:
        try:
            self._write(map(self._finding, self._cooldown.rest()))
        finally:
            self._file.close()

    def _finding(self, due: Due[Change]) -> dict[str, Any]:
        finding = due.newest.finding
        return {
            "t": iso(self._t),
            "kind": "finding",
            "change": due.newest.kind,
            "finding": finding.kind,
            "severity": finding.severity.value,
            "replica": finding.replica,
            "message": finding.message,
            **({"changes": due.kinds.total()} if due.since is not None else {}),
        }

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
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
        if not _is_http(url):
            raise UsageError(
                "the webhook (--webhook, TFT_WEBHOOK) is not an http(s) address; it is a secret "
                "and not shown here"
            )
        self._url = url
        self._run = run
        self._cooldown: Cooldown[Alarm] = Cooldown(cooldown)
        self._timeout = timeout
        self._t = 0.0

    def deliver(self, update: Update) -> None:
        self._t = update.t
        self._tell(self._cooldown.pass_on(alarms(update), update.t))

    def close(self) -> None:
        """Tell what was held back."""
        self._tell(self._cooldown.rest())

    def _tell(self, news: list[Due[Alarm]]) -> None:
        """In one message: a node takes many groups along, and chats limit the messages a second."""
        lines = [f"{self._run}: {due.newest.text}{due.summed_up(self._t)}" for due in news]
        if len(lines) > WEBHOOK_LINES:
            more = len(lines) - WEBHOOK_LINES
            lines[WEBHOOK_LINES:] = [f"{self._run}: … and {more} more like these"]
        if lines:
            self._post("\n".join(lines))

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
            except (OSError, http.client.HTTPException) as error:
                # The texts of these may hold the address.
                reason = getattr(error, "reason", error)
                problem = type(reason if isinstance(reason, Exception) else error).__name__
        raise KitError(problem)


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        return False
    # A space or a character beyond ASCII is refused by http.client in words that hold the address.
    plain = url.isascii() and url.isprintable() and " " not in url
    return plain and whole and parts.scheme in ("http", "https")
