"""The tokenizer's download: every way it fails is one clear line. The debug corpus is real."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from launcher import assets
from launcher.model import BlindError, KitError, UsageError
from launcher.shards import Shard, ShardSet


def response(code: int) -> httpx2.Response:
    return httpx2.Response(code, request=httpx2.Request("GET", "https://hub.invalid/x"))


@pytest.mark.parametrize(
    ("problem", "token", "kind", "says"),
    [
        (errors.GatedRepoError("gated", response=response(403)), None, UsageError, "hf auth login"),
        (
            errors.GatedRepoError("gated", response=response(403)),
            "t",
            UsageError,
            "accept the licence",
        ),
        (
            errors.RepositoryNotFoundError("no", response=response(404)),
            "t",
            UsageError,
            "no repository",
        ),
        (errors.HfHubHTTPError("busy", response=response(503)), "t", KitError, "refused"),
        (errors.LocalEntryNotFoundError("offline"), "t", KitError, "offline"),
        (httpx2.ConnectError("name resolution"), "t", KitError, "offline"),
        (OSError(28, "No space left on device"), "t", KitError, "No space left"),
    ],
)
def test_what_goes_wrong_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    token: str | None,
    kind: type[KitError],
    says: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(kind, match=says) as caught:
        assets.tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_only_the_tokenizer_is_fetched_and_no_token_is_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, **kwargs: Any) -> None:
        assert repository == "meta-llama/Llama-3.1-8B"
        assert set(kwargs) == {"allow_patterns", "local_dir"}
        assert all(name.endswith(".json") for name in kwargs["allow_patterns"])
        kwargs["local_dir"].mkdir(parents=True)
        (kwargs["local_dir"] / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert assets.tokenizer(tmp_path) == tmp_path / "assets" / "Llama-3.1-8B"


def test_the_debug_corpus_is_real_text_and_its_tokenizer_reads_it_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    place, built = assets.debug(tmp_path)
    assert built
    assert assets.debug(tmp_path) == (place, False)
    lines = (place / "corpus" / "train.jsonl").read_text().splitlines()
    text = json.loads(lines[0])["text"]
    tokenizer = Tokenizer.from_file(str(place / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert len(encoded.ids) < len(text) / 2
    assert len(lines) > 500


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A debug corpus with its tokenizer."""
    place, _ = assets.debug(tmp_path_factory.mktemp("built"))
    return place


class TestCheck:
    """Whether what was fetched is there, and whole."""

    @pytest.fixture
    def outputs(self, tmp_path: Path, whole: Path) -> Path:
        shutil.copytree(whole, tmp_path / "assets" / "debug")
        place = tmp_path / "assets" / "Llama-3.1-8B"
        place.mkdir()
        (place / "tokenizer.json").write_text('{"model": {}}')
        c4 = tmp_path / "assets" / "c4"
        c4.mkdir()
        (c4 / "a.json.gz").write_bytes(b"some")
        hashed = hashlib.sha256(b"some").hexdigest()
        ShardSet(
            dataset="c4",
            repository="allenai/c4",
            commit="0",
            shards=(Shard(name="en/a.json.gz", size=4, sha256=hashed),),
        ).write(c4 / "shards.json")
        return tmp_path

    def problems(self, outputs: Path, deep: bool = False) -> list[str]:
        return [problem for found in assets.check(outputs, deep) for problem in found.problems]

    def say(self, outputs: Path, deep: bool = False) -> list[str]:
        said: list[str] = []
        try:
            assets.report(outputs, deep, said.append)
        except KitError as error:
            said.append(f"error: {error}")
        return said

    def test_all_is_well(self, outputs: Path) -> None:
        assert self.problems(outputs, deep=True) == []
        place = outputs / "assets"
        assert self.say(outputs) == [
            f"ok      {place}/Llama-3.1-8B  tokenizer",
            f"ok      {place}/c4            c4: 1 shard, 0.0 MB",
            f"ok      {place}/debug         debug corpus and tokenizer",
        ]

    def test_nothing_at_all_is_not_well(self, tmp_path: Path) -> None:
        (problem,) = self.say(tmp_path)
        assert problem.startswith("error: no tokenizer and no data under ")
        assert "run `python -m launcher assets`" in problem

    @pytest.mark.parametrize(
        ("path", "kept", "says"),
        [
            ("Llama-3.1-8B/tokenizer.json", 5, "cut short or damaged: delete .*launcher assets`"),
            ("debug/tokenizer/tokenizer.json", 99, "cut short or damaged.*assets --debug`"),
            ("debug/corpus/train.jsonl", 1000, "has 1000 bytes only.*assets --debug`"),
            ("c4/a.json.gz", 3, "has 3 of 4 bytes: run .*--dataset c4`"),
        ],
    )
    def test_what_was_cut_short_is_found(
        self, outputs: Path, path: str, kept: int, says: str
    ) -> None:
        os.truncate(outputs / "assets" / path, kept)
        (problem,) = self.problems(outputs)
        assert re.search(says, problem)
        verdict, detail = [line for line in self.say(outputs) if not line.startswith("ok")][:2]
        assert verdict.startswith("FAILED")
        assert detail.strip() == problem
        assert self.say(outputs)[-1].startswith("error: not whole: ")

    def test_what_was_damaged_is_found_by_reading(self, outputs: Path) -> None:
        (outputs / "assets" / "c4" / "a.json.gz").write_bytes(b"sOme")
        text = outputs / "assets" / "debug" / "corpus" / "train.jsonl"
        text.write_text(text.read_text().replace('"}\n', "}\n", 1))
        assert self.problems(outputs) == []
        assert len(self.problems(outputs, deep=True)) == 2

    def test_a_tokenizer_that_is_gone_is_found_where_its_folder_is(self, outputs: Path) -> None:
        place = outputs / "assets" / "Llama-3.1-8B"
        (place / ".cache").mkdir()
        (place / "tokenizer.json").unlink()
        (problem,) = self.problems(outputs)
        assert "tokenizer.json is missing" in problem

    def test_a_list_that_cannot_be_read_is_no_success(self, outputs: Path) -> None:
        (outputs / "assets" / "c4" / "shards.json").write_text('{"shards": [{}]}')
        with pytest.raises(KitError, match="no list of shards"):
            self.problems(outputs)

    def test_what_cannot_be_looked_at_is_not_missing(self, outputs: Path) -> None:
        path = outputs / "assets" / "c4" / "a.json.gz"
        path.unlink()
        path.symlink_to(path.name)  # even root cannot look at it
        with pytest.raises(BlindError, match="cannot be looked at"):
            self.problems(outputs)
