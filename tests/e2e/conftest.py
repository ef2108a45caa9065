"""A workspace of its own and a real Slurm for the end-to-end tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launcher import assets
from launcher.rundir import Outputs
from launcher.sandbox import Sandbox
from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Workspace:
    """A clone of the repository as a user has it: everything that runs write stays in it."""

    root: Path
    env: dict[str, str]

    @property
    def outputs(self) -> Outputs:
        return Outputs(self.root / "outputs")

    def having(self, settings: Mapping[str, str]) -> Workspace:
        """The same, with more set in the environment."""
        return Workspace(self.root, {**self.env, **settings})

    def sh(self, *argv: str, code: int = 0, timeout: float = 60) -> str:
        """Run a command in the workspace; its output, standard error too."""
        done = subprocess.run(
            argv,
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, f"{argv} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def launcher(self, *argv: str, code: int = 0, timeout: float = 60) -> str:
        return self.sh(sys.executable, "-m", "launcher", *argv, code=code, timeout=timeout)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("clone")
    for name in ("launcher", "configs", "examples"):
        (root / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "slurm", root / "slurm")  # a test adds a script of its own
    for script in REPOSITORY.glob("*.sh"):
        (root / script.name).write_bytes(script.read_bytes())
    (root / "outputs" / "torchft" / ".slurm").mkdir(parents=True)
    assets.debug(root / "outputs")
    kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TZ") if k in os.environ}
    binaries = Path(sys.executable).parent
    kept["PATH"] = f"{binaries}:{kept.get('PATH', '')}"
    return Workspace(root, kept | {"TFT_ENV": str(binaries.parent)})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm sandbox needs root")
    sandbox = Sandbox(Path(f"/run/tft-test-{os.getpid()}"))
    sandbox.up(3)
    yield sandbox
    sandbox.down()


@pytest.fixture
def cluster(workspace: Workspace, sandbox: Sandbox) -> Workspace:
    """The workspace, with a shell environment that points at the sandbox."""
    return workspace.having(sandbox.environment())


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def processes_mentioning(text: str) -> list[str]:
    """Command lines of live processes that carry ``text`` in arguments or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(text in word for word in words):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except (psutil.Error, OSError):
            continue
    return found
