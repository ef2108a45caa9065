"""The Hugging Face hub: what a dataset's repository holds, and its files. Nothing else asks it."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol, TypeVar

from launcher.model import KitError, UsageError
from launcher.shards import Shard

#: Seconds for a question to the hub. Its library asks some of them without any limit.
ANSWER_SECONDS = 60.0
#: Characters of the shortest token that is looked for in errors; real ones have 37.
SHORTEST_TOKEN = 8
#: Names of the HTTP libraries below the hub's own, whose exceptions it lets through.
_HTTP_LIBRARIES = ("httpx2", "httpcore2", "httpx", "httpcore", "requests", "urllib3")

_Answer = TypeVar("_Answer")


class Hub(Protocol):
    """What is asked of a hub; every method may raise UsageError or KitError."""

    def commit(self, repository: str) -> str:
        """Hash of the newest commit of a dataset's repository."""

    def files(self, repository: str, commit: str, folder: str) -> list[Shard]:
        """The large files directly in ``folder`` at ``commit``."""

    def download(
        self,
        repository: str,
        commit: str,
        wanted: Shard,
        part: IO[bytes],
        progress: Callable[[int], None],
    ) -> None:
        """Write what is missing of ``wanted`` to the end of ``part``.

        ``progress`` is told of bytes as they come, of fewer than none when the hub started
        over, and may raise to stop it.
        """


class HuggingFace:
    """The real hub, or one like it at ``endpoint`` (default: ``HF_ENDPOINT``)."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def commit(self, repository: str) -> str:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        with explained(repository):
            found = _in_time(lambda: api.dataset_info(repository, expand=["sha"]), repository)
        return str(found.sha)

    def files(self, repository: str, commit: str, folder: str) -> list[Shard]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)

        def ask() -> list[Any]:
            tree = api.list_repo_tree(repository, folder, revision=commit, repo_type="dataset")
            return list(tree)

        with explained(repository):
            entries = _in_time(ask, repository)
        return [
            Shard(name=entry.path, size=entry.lfs.size, sha256=entry.lfs.sha256)
            for entry in entries
            if getattr(entry, "lfs", None) is not None
        ]

    def download(
        self,
        repository: str,
        commit: str,
        wanted: Shard,
        part: IO[bytes],
        progress: Callable[[int], None],
    ) -> None:
        # hf_hub_download (2.4.0) writes to a file of a random name and deletes it when it is
        # interrupted; this function below it goes on where a file ends.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        class Bar:
            """As much of tqdm as http_get uses."""

            def __init__(self, **_: Any) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, count: int) -> None:
                progress(count)

        url = hf_hub_url(
            repository, wanted.name, repo_type="dataset", revision=commit, endpoint=self._endpoint
        )
        with explained(repository):
            http_get(
                url,
                part,
                resume_size=part.tell(),
                # A file that a server compresses once more could not be resumed.
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=wanted.size,
                displayed_filename=wanted.name,
                tqdm_class=Bar,
            )


@contextlib.contextmanager
def explained(repository: str, *, kind: str = "datasets/", by_hand: str = "") -> Iterator[None]:
    """Turn what the hub's library raises into one line that says what to do.

    ``kind`` is the part of a page's address before the repository's name, and ``by_hand`` what
    else could be done where the hub cannot be reached.

    Raises:
        UsageError: no token, no access, no such repository.
        KitError: the hub cannot be reached, refuses, or the disk is full.
    """
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{kind}{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        if get_token() is None:
            raise UsageError(
                f"{repository} is gated and there is no token: run `hf auth login`, or set HF_TOKEN, "
                f"after accepting the licence at {page}"
            ) from error
        raise UsageError(
            f"{repository} is gated and your token has no access: accept the licence at {page} "
            "with the account of that token, and wait for the approval"
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = "" if get_token() else " (or it is private and there is no token: `hf auth login`)"
        raise UsageError(f"the hub has no repository {repository}{hint}") from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401 and get_token():
            raise UsageError(
                f"the hub refused {repository}, and your token: log in again with `hf auth login`, or "
                "mend HF_TOKEN (an old token is refused even where none is needed)"
            ) from error
        raise KitError(f"the hub refused {repository}: {first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KitError(f"{repository} was not fetched: {first_line(error)}") from error
        raise _unreachable(repository, by_hand, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise _unreachable(repository, by_hand, error) from error


def first_line(error: BaseException) -> str:
    """What an error says, on one short line, without a token or the signature of an address."""
    from huggingface_hub import get_token

    lines = str(error).strip().splitlines()
    said = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", lines[0] if lines else "")
    if len(token := get_token() or "") >= SHORTEST_TOKEN:
        said = said.replace(token, "…")
    return said[:200] or type(error).__name__


def _unreachable(repository: str, by_hand: str, error: BaseException) -> KitError:
    return KitError(
        f"{repository} could not be fetched ({first_line(error)}): is this machine offline? Run "
        f"this where the hub can be reached{by_hand}"
    )


def _in_time(ask: Callable[[], _Answer], repository: str) -> _Answer:
    """What ``ask`` returns or raises, if that takes no longer than ``ANSWER_SECONDS``."""
    answers: list[_Answer] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if failures:
        raise failures[0]
    if not answers:
        raise KitError(
            f"the hub has not answered about {repository} within {ANSWER_SECONDS:.0f} s: try again"
        )
    return answers[0]
