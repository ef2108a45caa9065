"""Dataset shards, fetched with the hub's real library from a hub on this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from launcher import download, shards
from launcher import hub as hub_module
from launcher.datafiles import MANIFEST
from launcher.download import Source, fetch, part_of
from launcher.hub import HuggingFace
from launcher.model import KitError, UsageError
from tests.conftest import REPOSITORY
from tests.unit.fake_hub import COMMIT, FakeHub, serving

NAMES = [f"en/c4-train.{number:05d}-of-01024.json.gz" for number in range(5)]
#: Bytes that the hub's library reads, and writes, at a time (10 MiB if not told otherwise).
CHUNK = 8192
SOURCE = Source(
    dataset="c4", repository="allenai/c4", template="en/c4-train.{:05d}-of-01024.json.gz", total=5
)
TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "END_SECONDS", 0.1)
    chance = random.Random(1)
    with serving({name: chance.randbytes(100_000 + len(name)) for name in NAMES}) as hub:
        yield hub


@pytest.fixture
def place(hostile: Path) -> Path:
    return hostile / "c4"


def get(hub: FakeHub, place: Path, count: int | None = 3, first: int = 0) -> list[str]:
    """Fetch; the lines that were said."""
    said: list[str] = []
    fetch(SOURCE, place, HuggingFace(hub.url), count=count, first=first, say=said.append)
    return said


def content(hub: FakeHub, place: Path) -> list[bool]:
    """For every shard that has a name of its own there: whether it is the hub's."""
    found = (place / Path(name).name for name in NAMES)
    return [p.read_bytes() == hub.files[f"en/{p.name}"] for p in found if p.exists()]


def interrupted(hub: FakeHub, place: Path, after: int) -> None:
    """Fetch the first shard, and press Ctrl-C when so many bytes of it have come."""
    hub.hold[NAMES[0]] = after + CHUNK // 2

    def tick(done: int, total: int) -> None:
        if done >= after - CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, place, HuggingFace(hub.url), count=1, tick=tick)
    hub.hold.clear()


def test_shards_come_whole_with_a_list_of_them(hub: FakeHub, place: Path) -> None:
    said = get(hub, place)
    assert content(hub, place) == [True] * 3
    listed = json.loads((place / MANIFEST).read_text())
    assert (listed["dataset"], listed["repository"], listed["commit"]) == (
        "c4", "allenai/c4", COMMIT,
    )  # fmt: skip
    assert [shard["name"] for shard in listed["shards"]] == NAMES[:3]
    assert listed["shards"][1]["size"] == len(hub.files[NAMES[1]])
    assert shards.verify(place, deep=True) == []
    assert sorted(p.name for p in place.iterdir() if p.suffix != ".gz") == [".lock", "shards.json"]
    assert said[0] == "allenai/c4: 3 of 3 shards to fetch, 0.3 MB"
    assert any("(3 of 3)" in line for line in said)


def test_nothing_is_fetched_twice_and_more_is_added(hub: FakeHub, place: Path) -> None:
    get(hub, place)
    hub.asked.clear()
    get(hub, place)
    get(hub, place, count=None)
    assert hub.asked == [], "all is known: the hub is not even asked"
    get(hub, place, count=2, first=3)
    assert content(hub, place) == [True] * 5
    assert all(hub.served[name] == len(hub.files[name]) for name in NAMES)
    whole = shards.read(place / MANIFEST)
    assert whole is not None
    assert [shard.name for shard in whole.shards] == NAMES


def test_after_ctrl_c_the_rest_is_fetched(hub: FakeHub, place: Path) -> None:
    interrupted(hub, place, 5 * CHUNK)
    part = part_of(place / Path(NAMES[0]).name)
    had = part.stat().st_size
    assert had >= 4 * CHUNK
    (problem,) = shards.verify(place)
    assert "half fetched (0 of 1 shards are whole)" in problem
    assert "launcher assets --dataset c4` goes on" in problem
    hub.asked.clear()
    get(hub, place, count=None)
    assert ("/store/" + NAMES[0], f"bytes={had}-") in hub.asked
    assert content(hub, place) == [True]
    assert shards.verify(place, deep=True) == []


def test_a_connection_that_ends_is_made_again_where_it_ended(hub: FakeHub, place: Path) -> None:
    hub.cut[NAMES[0]] = 3 * CHUNK + 1
    get(hub, place, count=1)
    assert content(hub, place) == [True]
    assert ("/store/" + NAMES[0], f"bytes={3 * CHUNK}-") in hub.asked


def test_what_came_damaged_is_fetched_once_more(hub: FakeHub, place: Path) -> None:
    hub.changed[NAMES[1]] = 1
    assert any("came damaged: once more" in line for line in get(hub, place))
    assert content(hub, place) == [True] * 3


def test_what_comes_damaged_twice_never_gets_its_name(hub: FakeHub, place: Path) -> None:
    hub.changed[NAMES[1]] = 2
    with pytest.raises(KitError, match="twice with another sha256"):
        get(hub, place)
    assert all(content(hub, place))
    assert not (place / Path(NAMES[1]).name).exists()
    assert not (place / MANIFEST).exists()
    get(hub, place, count=None)
    assert content(hub, place) == [True] * 3


def test_a_shard_that_was_cut_short_or_lost_is_found_and_mended(hub: FakeHub, place: Path) -> None:
    get(hub, place)
    first, second = (place / Path(name).name for name in NAMES[:2])
    os.truncate(first, 50_000)
    second.unlink()
    (problem,) = shards.verify(place)
    assert f"{first.name} has 50000 of {len(hub.files[NAMES[0]])} bytes" in problem
    assert f"{second.name} is missing" in problem
    assert "run `python -m launcher assets --dataset c4`" in problem
    hub.asked.clear()
    get(hub, place, count=None)
    assert ("/store/" + NAMES[0], "bytes=50000-") in hub.asked
    assert content(hub, place) == [True] * 3
    assert shards.verify(place, deep=True) == []


def test_damage_that_keeps_the_size_is_found_by_reading(hub: FakeHub, place: Path) -> None:
    get(hub, place)
    path = place / Path(NAMES[2]).name
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    assert shards.verify(place) == []
    (problem,) = shards.verify(place, deep=True)
    assert f"damaged: {path.name} not as on the hub" in problem
    assert "delete" in problem


def test_files_copied_by_hand_are_taken_by_their_hash(hub: FakeHub, place: Path) -> None:
    place.mkdir()
    good, bad = (place / Path(name).name for name in NAMES[:2])
    good.write_bytes(hub.files[NAMES[0]])
    bad.write_bytes(bytes(len(hub.files[NAMES[1]])))
    get(hub, place, count=2)
    assert content(hub, place) == [True] * 2
    assert hub.served[NAMES[0]] == 0


def test_a_longer_plan_that_was_given_up_is_no_part_of_a_shorter_one(
    hub: FakeHub, place: Path
) -> None:
    hub.changed[NAMES[4]] = 2
    with pytest.raises(KitError):
        get(hub, place, count=5)
    get(hub, place, count=2)
    whole = shards.read(place / MANIFEST)
    assert whole is not None
    assert [shard.name for shard in whole.shards] == NAMES[:2]
    assert shards.verify(place, deep=True) == []


def test_while_more_is_fetched_the_set_stays_as_it_was(hub: FakeHub, place: Path) -> None:
    """A group that starts again meanwhile must read the same files as its peers."""
    get(hub, place, count=2)
    before = (place / MANIFEST).read_bytes()
    hub.changed[NAMES[3]] = 2
    with pytest.raises(KitError):
        get(hub, place, count=5)
    assert (place / MANIFEST).read_bytes() == before
    (problem,) = shards.verify(place)
    assert "of 5 shards are whole" in problem


def test_too_little_space_is_said_before_anything_comes(
    hub: FakeHub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10_000_000, 0, 400_000))
    with pytest.raises(UsageError, match=r"needs 0\.3 MB more, and its file system has 0\.4 MB"):
        get(hub, place)
    assert not hub.served
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10_000_000, 0, 401_000))
    get(hub, place)


def test_of_two_at_once_one_is_refused(hub: FakeHub, place: Path) -> None:
    refusals: list[str] = []

    def tick(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(UsageError, match="is fetching into") as caught:
                get(hub, place)
            refusals.append(str(caught.value))

    fetch(SOURCE, place, HuggingFace(hub.url), count=2, tick=tick)
    assert refusals[0].startswith(f"process {os.getpid()} on ")
    assert content(hub, place) == [True] * 2
    get(hub, place)


@pytest.mark.parametrize(("count", "first"), [(6, 0), (1, 5), (3, 3)])
def test_shards_that_do_not_exist_are_refused(
    hub: FakeHub, place: Path, count: int, first: int
) -> None:
    with pytest.raises(UsageError, match="c4 has 5 shards, numbered from 0"):
        get(hub, place, count=count, first=first)
    assert hub.asked == []
    assert not place.exists()


def test_without_a_number_there_must_be_something_to_complete(hub: FakeHub, place: Path) -> None:
    with pytest.raises(UsageError, match="--shards N"):
        get(hub, place, count=None)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [(401, UsageError, "hf auth login"), (418, KitError, "the hub refused allenai/c4")],
)
def test_a_refusal_is_one_line_without_the_token(
    hub: FakeHub,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: type[KitError],
    says: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refusal = status
    with pytest.raises(kind, match=says) as caught:
        get(hub, place)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_token_goes_to_the_hub_and_not_to_where_it_keeps_the_files(
    hub: FakeHub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not any(TOKEN in line or "s3cret" in line for line in get(hub, place))
    assert (hub.tokens, hub.store_tokens) == ({f"Bearer {TOKEN}"}, {None})
    assert TOKEN not in (place / MANIFEST).read_text()


def test_no_hub_is_one_line(place: Path) -> None:
    with pytest.raises(KitError, match="is this machine offline") as caught:
        fetch(SOURCE, place, HuggingFace("http://127.0.0.1:9"), count=1)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.1)
    with pytest.raises(KitError, match="has not answered"):
        hub_module._in_time(lambda: time.sleep(1), "allenai/c4")


def test_secrets_of_addresses_and_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = hub_module.first_line(
        OSError(f"bad header 'Bearer {TOKEN}' for 'https://store.invalid/a/b?Signature=s3cret&k=1'")
    )
    assert said == "bad header 'Bearer …' for 'https://store.invalid/a/b'"


def test_a_full_disk_is_not_taken_for_a_missing_network() -> None:
    with (
        pytest.raises(KitError, match=r"not fetched.*No space left") as caught,
        hub_module.explained("allenai/c4"),
    ):
        raise OSError(28, "No space left on device")
    assert "offline" not in str(caught.value)


def test_the_command_goes_on_after_an_interruption(hub: FakeHub, tmp_path: Path) -> None:
    """The command itself, ended by SIGTERM within the second of two shards."""
    mebibyte = 1 << 20
    hub.files[NAMES[1]] = random.Random(2).randbytes(12 * mebibyte)
    hub.hold[NAMES[1]] = 11 * mebibyte
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY),
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
    }  # fmt: skip
    argv = [sys.executable, "-m", "launcher", "assets", "--dataset", "c4"]
    with subprocess.Popen(
        [*argv, "--shards", "2"], env=env, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as command:  # fmt: skip
        place = tmp_path / "outputs" / "assets" / "c4"
        part = part_of(place / Path(NAMES[1]).name)
        first = place / Path(NAMES[0]).name
        deadline = time.monotonic() + 60
        while not (first.exists() and part.exists() and part.stat().st_size >= 10 * mebibyte):
            assert time.monotonic() < deadline
            assert command.poll() is None, command.communicate()[0]
            time.sleep(0.05)
        command.send_signal(signal.SIGTERM)
        said, _ = command.communicate(timeout=30)
    assert command.returncode == 130, said
    assert "interrupted: what has come is kept" in said
    assert TOKEN not in said
    assert "Traceback" not in said
    hub.hold.clear()
    hub.served.clear()
    again = subprocess.run(
        argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 0, again.stderr
    assert f"--training.dataset jsonl --training.dataset_path {Path('outputs/assets/c4')}" in (
        again.stdout
    )
    assert hub.served == {NAMES[1]: 2 * mebibyte}
    check = subprocess.run(
        [*argv[:4], "--check", "--deep"], env=env, cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert check.returncode == 0, check.stderr
    assert check.stdout == "ok      outputs/assets/c4  c4: 2 shards, 12.7 MB\n"
