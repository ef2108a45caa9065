"""What training needs besides code: the model's tokenizer, or the debug corpus."""

from __future__ import annotations

from pathlib import Path

from launcher import corpus
from launcher.model import KitError, UsageError

REPOSITORY = "meta-llama/Llama-3.1-8B"
#: The tokenizer's files in that repository (not the weights: pretraining makes those).
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def folder(outputs: Path) -> Path:
    """Where the config files look for assets: below ``outputs/`` of the repository, wherever
    runs themselves may write (``TFT_OUTPUTS``)."""
    return outputs / "assets"


def debug(outputs: Path) -> tuple[Path, bool]:
    """Build the debug corpus and tokenizer; (their folder, whether anything was built)."""
    place = folder(outputs) / "debug"
    return place, corpus.build(place)


def tokenizer(outputs: Path, repository: str = REPOSITORY) -> Path:
    """Download the tokenizer of ``repository``; what is there already is not fetched again.

    The token comes from the environment (``HF_TOKEN``) or from ``hf auth login``; it is
    never an argument, and never printed.

    Raises:
        UsageError: no token, or no access to a gated repository.
        KitError: the hub cannot be reached, or the download broke off.
    """
    from huggingface_hub import errors, get_token, snapshot_download

    place = folder(outputs) / repository.rsplit("/", 1)[-1]
    page = f"https://huggingface.co/{repository}"
    try:
        snapshot_download(repository, allow_patterns=list(FILES), local_dir=place)
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
        raise KitError(f"the hub refused {repository}: {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _unreachable(repository, place, error) from error
    except Exception as error:
        # The HTTP library below the hub's own raises exceptions of its own kind.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        raise _unreachable(repository, place, error) from error
    if not (place / FILES[0]).is_file():
        raise KitError(f"{repository} was fetched, but has no {FILES[0]}: is it a Llama 3 model?")
    return place


def _unreachable(repository: str, place: Path, error: BaseException) -> KitError:
    return KitError(
        f"{repository} could not be fetched ({_first_line(error)}): is this machine offline? Run "
        f"this where the hub can be reached, or copy {FILES[0]} into {place}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
