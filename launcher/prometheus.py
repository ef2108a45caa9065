"""The monitor's figures for Prometheus (``docs/metrics.md``), served by a thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.incidents import Cause
from launcher.model import GroupState, UsageError
from launcher.sinks import Update

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Described:
    """One metric as documented; a name that ends in ``_total`` is a counter."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()


#: Every metric: a contract, and the rows of ``docs/metrics.md``.
METRICS = (
    Described("tft_quorum_id", "Number of the current quorum; it grows with every change"),
    Described("tft_quorum_members", "Replica groups in the current quorum"),
    Described("tft_group_size", "Replica groups of the whole run"),
    Described("tft_step", "Newest committed step of the run"),
    Described("tft_loss", "Latest loss that a replica group reported", ("replica",)),
    Described("tft_tokens_per_second", "Latest speed of rank 0 of a group", ("replica",)),
    Described("tft_busy_seconds", "Own work of a group in a step, without waiting", ("replica",)),
    Described("tft_replica_step", "Newest committed step of a replica group", ("replica",)),
    Described("tft_replica_state", "1 for the state a group is in, else 0", ("replica", "state")),
    Described("tft_commits_total", "Committed steps, over all replica groups"),
    Described("tft_failed_commits_total", "Steps tried and not committed, over all groups"),
    Described(
        "tft_incidents_total",
        "Losses of a replica group or of the lighthouse, by cause",
        ("cause",),
    ),
    Described("tft_time_to_recover_seconds", "Duration of a replica group's latest recovery"),
    Described("tft_participation", "Mean quorum size over group size, 0 to 1"),
    Described("tft_step_efficiency", "Committed over attempted steps, 0 to 1"),
    Described("tft_findings", "Findings that stand right now", ("kind", "severity")),
    Described("tft_monitor_blind", "1 while the monitor cannot read one of its sources"),
    Described("tft_weights_differences", "Compared weights that differ between replica groups"),
    Described("tft_last_look_timestamp_seconds", "When the figures were taken, Unix seconds"),
)

_Sample = tuple[tuple[str, ...], float]


class Prometheus(Collector):
    """Serves the newest update at ``http://ADDR:PORT/metrics``."""

    name = "Prometheus endpoint"

    def __init__(self, place: str) -> None:
        """Listen.

        Args:
            place: ``PORT`` or ``ADDR:PORT``; without an address, this machine only.

        Raises:
            UsageError: not a place to listen at, or it is taken.
        """
        address, port = _parse(place)
        self._update: Update | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise UsageError(
                f"--prometheus cannot listen on {address}:{port}: {error.strerror or error}; "
                "choose another port"
            ) from error
        self.port = int(self._server.server_port)

    def deliver(self, update: Update) -> None:
        self._update = update

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client in the thread of each scrape."""
        update = self._update
        if update is None:
            return
        samples = _samples(update)
        for described in METRICS:
            family = (
                CounterMetricFamily if described.name.endswith("_total") else GaugeMetricFamily
            )(described.name, described.meaning, labels=described.labels)
            for labels, value in samples[described.name]:
                family.add_metric(labels, value)
            yield family


def _samples(update: Update) -> dict[str, list[_Sample]]:
    groups = [(str(group.replica), group) for group in update.groups]
    findings: dict[tuple[str, ...], int] = {}
    for finding in update.findings:
        key = (finding.kind, finding.severity.value)
        findings[key] = findings.get(key, 0) + 1
    return {
        "tft_quorum_id": _one(update.quorum_id),
        "tft_quorum_members": _one(len(update.members)),
        "tft_group_size": _one(update.group_size),
        "tft_step": _one(update.step),
        "tft_loss": _known(((name,), group.loss) for name, group in groups),
        "tft_tokens_per_second": _known(
            ((name,), group.tokens_per_second) for name, group in groups
        ),
        "tft_busy_seconds": _known(((name,), group.busy_seconds) for name, group in groups),
        "tft_replica_step": [((name,), group.step) for name, group in groups],
        "tft_replica_state": [
            ((name, state.value), float(group.state is state))
            for name, group in groups
            for state in GroupState
        ],
        "tft_commits_total": _one(sum(group.commits for _, group in groups)),
        "tft_failed_commits_total": _one(sum(group.failed_commits for _, group in groups)),
        "tft_incidents_total": [
            ((cause.value,), float(update.causes.get(cause.value, 0))) for cause in Cause
        ],
        "tft_time_to_recover_seconds": _one(update.last_recovery),
        "tft_participation": _one(update.figures["participation"]),
        "tft_step_efficiency": _one(update.figures["step_efficiency"]),
        "tft_findings": [(key, float(count)) for key, count in findings.items()],
        "tft_monitor_blind": _one(float(update.blind)),
        "tft_weights_differences": _one(update.weights_differences),
        "tft_last_look_timestamp_seconds": _one(update.t),
    }


def _one(value: float | None) -> list[_Sample]:
    return _known([((), value)])


def _known(samples: Iterable[tuple[tuple[str, ...], float | None]]) -> list[_Sample]:
    """What has been measured: a metric without a value has no sample, not a zero."""
    return [(labels, value) for labels, value in samples if value is not None]


def _parse(place: str) -> tuple[str, int]:
    address, _, port = place.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--prometheus must look like 9400 or 0.0.0.0:9400, not {place!r}")
    return address.strip("[]") or LOOPBACK, int(port)
