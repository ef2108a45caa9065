"""Files that are written whole or not at all, also on network file systems."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from launcher.model import BlindError, KitError


def create_once(path: Path, content: str) -> bool:
    """Create ``path`` whole, or leave the one that is there; True when it was ours.

    Works on NFS, where exclusive creation and writing are two steps: a complete file
    is linked into place.
    """
    temporary = _write_temporary(path, content)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


def replace(path: Path, content: str, mode: int = 0o644) -> None:
    """Write ``path`` whole or not at all."""
    temporary = _write_temporary(path, content, mode)
    try:
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def overwrite(path: Path, content: str) -> None:
    """Write ``path`` in place.

    Network file systems show a change of a file at its next open, and that another file has
    taken its name perhaps half a minute later. For what others poll; small enough for one write.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        data = content.encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file.

    Raises:
        BlindError: it is there and cannot be read.
        KitError: it is not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BlindError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise KitError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise KitError(f"{path} is not a JSON object")
    return value


def _write_temporary(path: Path, content: str, mode: int = 0o644) -> str:
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error
    return temporary
