"""The report: of a real run that lost a node, and of a made-up long run of many groups."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.digest import digest
from launcher.events import Event, Source
from launcher.findings import Finding, Severity
from launcher.history import History
from launcher.model import ReportFormat, UsageError
from launcher.pictures import ROWS, labels
from launcher.publish import publish
from launcher.report import render
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm
from launcher.state import RunState
from tests.conftest import FIXTURES, FakeRun

GROUPS, LOSSES, STEP_SECONDS, DAY = 64, 30, 60.0, 86400.0
START = 1795183200.0
HOSTILE = "<script>alert(1)</script>\" onload='x' | `y` & </svg></title>\x1b[31m\u202e\n# head"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: FakeRun) -> RunDir:
    """The recorded run, where Slurm does not answer."""
    fake_run.on("squeue", code=1, err="Unable to contact slurm controller")
    monkeypatch.setattr("launcher.scheduler.Slurm", lambda: Slurm(fake_run))
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


def long_run(text: str = "RuntimeError: CUDA error: an illegal memory access") -> Iterator[Event]:
    """A day of 64 replica groups that are lost 30 times; ``text`` is what their logs say."""
    chance = random.Random(7)
    first = [
        (START + chance.uniform(0.02, 0.97) * DAY, chance.randrange(GROUPS))
        for _ in range(LOSSES - 2)
    ]
    # Two nodes at almost the same moment, and one that does not come back in time.
    losses = sorted(
        [*first, (first[0][0] + 40.0, (first[0][1] + 1) % GROUPS), (START + DAY - 400, 9)]
    )
    away: dict[int, list[tuple[float, float]]] = {}
    events: list[Event] = []

    def say(t: float, kind: str, replica: int | None = None, **fields: object) -> None:
        source = Source(f"tft-1_{replica}.err", int(t) % 1000003)
        events.append(Event(t=t, kind=kind, replica=replica, fields=fields, source=source))

    for replica in range(GROUPS):
        say(START, "launch", replica, attempt=1, host=f"node-{replica:03d}")
    for number, (t, replica) in enumerate(losses):
        back = t + (7200.0 if number == 12 else chance.uniform(150, 900))
        away.setdefault(replica, []).append((t, back))
        if number % 3 == 0:
            say(t, "slurm_cancelled", replica, host="n", due="NODE FAILURE")
        elif number % 3 == 1:
            say(t, "exception", replica, text=text)
        say(
            t + 1,
            "exit",
            replica,
            code=1,
            reason="rank 3 failed" if number % 3 else "stopped by 15",
        )
        if back < START + DAY:
            attempt = len(away[replica]) + 1
            say(back - 100, "launch", replica, attempt=attempt, host=f"node-{64 + number:03d}")
            step = int((back - START) / STEP_SECONDS)
            say(back + 4, "heal", replica, step=step, source=(replica + 1) % GROUPS, rank=0)
            say(back + 9, "commit", replica, step=step, rank=0, committed=True)

    def there(t: float) -> list[int]:
        return [r for r in range(GROUPS) if not any(a + 2 <= t < b for a, b in away.get(r, []))]

    changes = {START + 45.0} | {t + more for t, _ in losses for more in (2.0,)}
    changes |= {b for spans in away.values() for _, b in spans if b < START + DAY}
    for quorum_id, t in enumerate(sorted(changes), start=1):
        step = int((t - START) / STEP_SECONDS)
        members = []
        for r in there(t):
            attempt = sum(b <= t for _, b in away.get(r, []))
            fresh = any(b == t for _, b in away.get(r, []))
            members.append((r, f"uuid-{attempt}", 0 if fresh else step, "http://x"))
        say(t, "membership", quorum_id=quorum_id, members=members)
    for step in range(1, int(DAY / STEP_SECONDS)):
        t = START + step * STEP_SECONDS
        loss = 2.1 + 9.0 * math.exp(-step / 180) + chance.gauss(0, 0.05)
        for r in there(t):
            if not any(a <= t < b + 9 for a, b in away.get(r, [])):
                speed = chance.gauss(7000, 60)
                say(t + r / 1000, "commit", r, step=step, rank=0, committed=True)
                say(t + 0.2 + r / 1000, "metrics", r, loss=loss, tokens_per_second=speed)
    yield from sorted(events, key=lambda event: event.t)


def told(events: Iterator[Event], groups: int = GROUPS) -> tuple[Manifest, RunState, History]:
    manifest = Manifest(
        run="tft-1",
        array_job_id=1,
        group_size=groups,
        ranks_per_group=8,
        config="configs/llama3.1-8b.toml",
        extra_args=("--training.steps", "2000"),
        lighthouse="http://login-0:29510",
        steps=2000,
        submitted_by="ada",
        versions={"torch": "2.13.0", "torchtitan": "0.2.2"},
    )
    state, history = RunState(groups, 2000), History()
    for event in events:
        state.apply(event)
        history.note(state, event)
    return manifest, state, history


class Checker(HTMLParser):
    """Collects what a page has of elements, and holds that they are closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def words(page: str) -> str:
    """What a person reads on a page, apart from the pictures."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_report_says_which_script_was_run_and_how() -> None:
    manifest = Manifest(
        run="tft-7",
        array_job_id=7,
        group_size=1,
        ranks_per_group=1,
        config="",
        script="my train.py",
        script_args=("--n", "$(x)"),
    )
    said = digest(manifest, RunState(1), History(), [], START)
    assert ("Script", "'my train.py' --n '$(x)'") in said.facts


def first_sign(run: RunDir) -> str:
    """The clock at the first sign of the only incident: what that is, others test."""
    (incident,) = json.loads(publish(run, ReportFormat.JSON).read_text())["incidents"]
    return str(incident["first_sign"])[11:19]


def since(text: str) -> str:
    """``text`` without how long after the first sign something was."""
    return re.sub(r"\+[0-9.]+ s", "+T", text)


def test_the_page_of_a_lost_node(run: RunDir) -> None:
    first = first_sign(run)
    path = publish(run, ReportFormat.HTML)
    assert path == run.path / "report.html"
    page = path.read_text()
    Checker(page)
    text = since(words(page))
    for part in (
        "Run tft-5183502",
        "trained to the last step as of 2026-11-20 14:06:5",
        "Time to recover 17.5 s",
        "Participation 91.8%",
        "Weights identical 186 (step, rank) pairs compared",
        "configs/debug-cpu.toml --training.steps 120",
        "2, of 2 ranks each",
        "119 of 120 committed",
        "torchft-nightly 2026.10.26",
        f"1 1 worker-1 unknown: stopped by SIGTERM {first} at step 10 14:05:33 +T",
        " 14:05:50 +T at step 37 1 2.8 s",
        "Started again 14:05:37 +T · imports 10.1 s, model 0.9 s, quorum 0.4 s, ",
        "Rejoined 14:05:49 +T Healed 14:05:50 +T · from 0 ",
        "Back at full strength 14:05:49 +T ",
        "stopped by SIGTERM unknown · tft-5183502_1.events.jsonl, byte 6,980",
        "None: nothing was wrong at the end.",
    ):
        assert part in text
    assert page.count("<svg") == 2
    assert 'href="#incident-1"' in page
    assert 'id="incident-1"' in page


def test_the_offset_of_the_evidence_is_that_of_its_line(run: RunDir) -> None:
    data = json.loads(publish(run, ReportFormat.JSON).read_text())
    (evidence,) = data["incidents"][0]["evidence"]
    with (run.path / evidence["file"]).open("rb") as file:
        file.seek(evidence["offset"])
        assert json.loads(file.readline())["reason"] == "stopped by SIGTERM"


def test_the_report_as_data(run: RunDir) -> None:
    path = publish(run, ReportFormat.JSON)
    assert path == run.path / "report.json"
    data = json.loads(path.read_text())
    assert (data["run"], data["step"], data["findings"]) == ("tft-5183502", 119, [])
    assert data["figures"]["time_to_recover_s"] == pytest.approx(17.45, abs=0.01)
    assert data["weights"] == {"compared": 186, "differences": 0}
    (incident,) = data["incidents"]
    assert (incident["cause"], incident["node"]) == ("unknown: stopped by SIGTERM", "worker-1")
    assert (incident["healed_from"], incident["recovered_at_step"]) == (0, 37)
    assert incident["rejoined_at"] == "2026-11-20T14:05:49.481+00:00"
    assert incident["full_strength_at"] == "2026-11-20T14:05:49.481+00:00"
    assert (incident["requeued_at"], incident["waited_for_slurm_s"]) == (None, None)


def test_the_report_as_text(run: RunDir, tmp_path: Path) -> None:
    first = first_sign(run)
    path = publish(run, ReportFormat.MARKDOWN, tmp_path / "a b.md")
    assert path == tmp_path / "a b.md"
    text = since(path.read_text())
    for part in (
        "# Run tft-5183502\n",
        "| Time to recover | 17.5 s |",
        "| 2 | ",
        f"| 1 | 1 | worker-1 | unknown: stopped by SIGTERM | 2026-11-20 {first} at step 10 |",
        "| 14:05:50 (+T) from 0 |",
        "byte 6,980 |",
        " | 14:05:49 (+T) | 1 | 2.8 s |",
        "## Findings at the end\n\nNone.\n",
    ):
        assert part in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count(" |") for row in table.splitlines()}) == 1, table


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``python -m launcher report`` with these arguments."""
    monkeypatch.setattr("sys.argv", ["launcher", "report", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_the_command_says_where_the_report_is(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TFT_OUTPUTS", str(run.path.parent.parent))
    assert command(monkeypatch, "5183502") == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    assert (run.path / "report.html").read_text().startswith("<!doctype html>")


def test_a_run_that_is_not_there(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TFT_OUTPUTS", str(run.path.parent.parent))
    assert command(monkeypatch, "77") == UsageError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("error: no run '77' under ")
    assert said.endswith("the newest are: tft-5183502\n")


def test_an_output_that_cannot_be(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a folder, make it first"):
        publish(run, ReportFormat.HTML, tmp_path / "missing" / "report.html")
    with pytest.raises(UsageError, match=r"it is a folder, name a file in it"):
        publish(run, ReportFormat.HTML, tmp_path)


def test_a_run_that_has_not_begun(tmp_path: Path, run: RunDir) -> None:
    for path in run.path.glob("*.*l*"):
        if path != run.manifest_path:
            path.unlink()
    page = publish(run, ReportFormat.HTML).read_text()
    assert "None: neither a replica group nor the lighthouse was lost." in words(page)
    # It is not over, and Slurm cannot be asked: that is said.
    assert "critical monitor_blind : Slurm cannot be read" in words(page)
    assert "nothing measured" in page
    assert "2 waiting in Slurm" in words(publish(run, ReportFormat.MARKDOWN).read_text())


@pytest.fixture(scope="module")
def big() -> tuple[Manifest, RunState, History]:
    return told(long_run(HOSTILE))


def pages(big: tuple[Manifest, RunState, History], shape: ReportFormat) -> str:
    manifest, state, history = big
    finding = Finding(
        kind="bad_node", severity=Severity.WARNING, message=f"lost on {HOSTILE}: leave it out"
    )
    return render(shape, manifest, state, history, [finding], state.last_event)


def test_a_long_run_of_many_groups_is_bounded(big: tuple[Manifest, RunState, History]) -> None:
    _, state, history = big
    assert len(state.incidents) == LOSSES
    assert len(history.groups) == GROUPS
    page = pages(big, ReportFormat.HTML)
    assert len(page) < 500_000
    assert [f'id="incident-{n}"' in page for n in range(1, LOSSES + 1)] == [True] * LOSSES
    assert len(pages(big, ReportFormat.MARKDOWN)) < 60_000


def test_hostile_text_stays_text(big: tuple[Manifest, RunState, History]) -> None:
    page = pages(big, ReportFormat.HTML)
    checker = Checker(page)
    assert not checker.elements & {"script", "img", "link", "iframe", "object", "image"}
    assert not [name for name, _ in checker.attributes if name.startswith("on") or name == "src"]
    links = {value for name, value in checker.attributes if name.endswith("href")}
    assert all(link is not None and link.startswith("#") for link in links)
    assert "url(http" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    text = pages(big, ReportFormat.MARKDOWN)
    assert r"\<script\>alert(1)\</script\>" in text
    assert not re.search(r"^# head", text, flags=re.MULTILINE)
    data = json.loads(pages(big, ReportFormat.JSON))
    assert HOSTILE in {line["text"] for i in data["incidents"] for line in i["evidence"]}


def test_pictures_take_every_colour_from_the_page(big: tuple[Manifest, RunState, History]) -> None:
    page = pages(big, ReportFormat.HTML)
    style, body = page.split("</style>", 1)
    assert not re.findall(r"(?:fill|stroke): ?#", body)
    for name in set(re.findall(r"var\((--\w+)\)", page)):
        assert style.count(f"{name}: ") == 2, f"{name} has a light and a dark colour"


def test_numbers_of_incidents_do_not_overlap(big: tuple[Manifest, RunState, History]) -> None:
    _, state, _ = big
    end = START + DAY
    written = labels(state.incidents, START, end)
    assert [label.text for label in written] == [str(n) for n in range(1, LOSSES + 1)]
    crowded = labels(state.incidents * 60, START, end)
    for some in (written, crowded):
        for row in range(ROWS):
            here = [label for label in some if label.row == row]
            assert all(a.right <= b.x for a, b in itertools.pairwise(here))
    assert len(crowded) < 300
