"""The monitor's figures for Prometheus, scraped over HTTP, and the dashboard made of them."""

import dataclasses
import json
import re
import socket
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.events import Event
from launcher.findings import Finding, Severity
from launcher.model import UsageError
from launcher.prometheus import METRICS, Prometheus
from tests.conftest import REPOSITORY
from tests.unit.telling import run, story, updates

__all__ = ["run", "story"]


def scrape(port: int) -> dict[str, list[Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        sample.name: [s for s in family.samples if s.name == sample.name]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_serves_the_documented_metrics(story: list[Event]) -> None:
    endpoint = Prometheus("0")
    try:
        assert scrape(endpoint.port) == {}
        got = updates(story)
        endpoint.deliver(next(update for update in got if update.findings))
        (finding,) = scrape(endpoint.port)["tft_findings"]
        assert finding.labels == {"kind": "loss_nan", "severity": "critical"}
        measured = tuple(dataclasses.replace(g, busy_seconds=0.25) for g in got[-1].groups)
        endpoint.deliver(dataclasses.replace(got[-1], groups=measured))
        seen = scrape(endpoint.port)
        with socket.create_server(("", 0)) as other, pytest.raises(UsageError, match="listen"):
            Prometheus(str(other.getsockname()[1]))
    finally:
        endpoint.close()

    def value(name: str, **labels: str) -> float:
        (sample,) = (s for s in seen[name] if s.labels == labels)
        return float(sample.value)

    assert set(seen) | {"tft_findings"} == {metric.name for metric in METRICS}
    assert value("tft_quorum_id") == 3
    assert value("tft_step") == 119
    assert value("tft_busy_seconds", replica="1") == 0.25
    assert value("tft_failed_commits_total") == 1
    assert value("tft_commits_total") == 212
    assert value("tft_incidents_total", cause="unknown") == 1
    assert value("tft_time_to_recover_seconds") == pytest.approx(17.5, abs=0.1)
    assert value("tft_replica_state", replica="1", state="DONE") == 1
    assert value("tft_replica_state", replica="1", state="LOST") == 0
    assert sum(s.value for s in seen["tft_replica_state"]) == 2
    for place in ("nine", "1.2.3.4", "70000"):
        with pytest.raises(UsageError, match="--prometheus must look like"):
            Prometheus(place)


def test_prometheus_bears_any_text_and_any_number(story: list[Event]) -> None:
    hostile = 'a"b\\c\nd{e="f"} 1\n# HELP ü'
    endpoint = Prometheus("127.0.0.1:0")
    try:
        last = updates(story)[-1]
        found = (Finding(kind=hostile, severity=Severity.INFO, message=hostile),) * 2
        groups = tuple(
            dataclasses.replace(g, loss=loss)
            for g, loss in zip(last.groups, (float("nan"), float("inf")), strict=True)
        )
        endpoint.deliver(dataclasses.replace(last, findings=found, groups=groups))
        seen = scrape(endpoint.port)
    finally:
        endpoint.close()
    (finding,) = seen["tft_findings"]
    assert (finding.labels, finding.value) == ({"kind": hostile, "severity": "info"}, 2)
    assert [str(s.value) for s in seen["tft_loss"]] == ["nan", "inf"]


@pytest.mark.parametrize("place", ["{port}", "127.0.0.1:{port}", "no-such-host.invalid:1"])
def test_a_place_where_prometheus_cannot_listen_is_told_in_one_line(place: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = place.format(port=other.getsockname()[1])
        with pytest.raises(UsageError, match="--prometheus cannot listen on") as refused:
            Prometheus(place)
    assert str(refused.value).endswith("; choose another port")
    assert "\n" not in str(refused.value)


def test_every_metric_is_documented_and_nothing_else() -> None:
    rows = re.findall(
        r"^\| `(tft_\w+)(?:\{(.*)\})?` \| (.*) \|$",
        (REPOSITORY / "docs" / "metrics.md").read_text(),
        flags=re.MULTILINE,
    )
    assert rows == [(m.name, ", ".join(m.labels), m.meaning) for m in METRICS]


def test_the_grafana_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((REPOSITORY / "configs" / "grafana-dashboard.json").read_text())
    assert (board["title"], board["schemaVersion"] >= 36, board["id"]) == (
        "torchft run",
        True,
        None,
    )
    panels, names = board["panels"], {metric.name: set(metric.labels) for metric in METRICS}
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked: set[str] = set()
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            found = set(re.findall(r"\btft_\w+", target["expr"]))
            assert found, target
            assert found <= set(names), found - set(names)
            labels = {label for name in found for label in names[name]}
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= labels, target
            asked |= found
    assert asked == set(names)
