"""The tokenizer's download: every way it fails is one clear line. The debug corpus is real."""

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from launcher import assets
from launcher.model import KitError, UsageError


def response(code: int) -> httpx.Response:
    return httpx.Response(code, request=httpx.Request("GET", "https://hub.invalid/x"))


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
        (httpx.ConnectError("name resolution"), "t", KitError, "offline"),
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
