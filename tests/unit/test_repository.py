"""Rules about the repository itself: scripts, imports, and what must never be imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted([*REPOSITORY.glob("*.sh"), *REPOSITORY.glob("slurm/*.s*")])
#: Those whose tasks train.
JOBS = [*sorted(REPOSITORY.glob("*.sh")), REPOSITORY / "slurm" / "replica-group.sbatch"]
LAUNCHER = REPOSITORY / "launcher"
#: The control plane, from the bottom up: a module imports only what stands before it.
ORDER = [
    "__init__",
    "parentage",
    "children",
    "datafiles",
    "lighthouse_process",
    "model",
    "lock",
    "process",
    "restarts",
    "timeouts",
    "titan",
    "titan_names",
    "batches",
    "methods",
    "relay",
    "variables",
    "config",
    "settings",
    "layers",
    "files",
    "rundir",
    "cluster",
    "slurm",
    "local",
    "scheduler",
    "terms",
    "reach",
    "lighthouse",
    "corpus",
    "shards",
    "hub",
    "download",
    "assets",
    "gpus",
    "preflight",
    "environment",
    "command",
    "payload",
    "lease",
    "spares",
    "orders",
    "stacks",
    "nodecheck",
    "names",
    "fields",
    "patterns",
    "events",
    "lighthouse_log",
    "compaction",
    "capped_log",
    "guardian_child",
    "lighthouse_child",
    "office",
    "supervisor",
    "records",
    "leaving",
    "plan",
    "deputy",
    "standby",
    "wire",
    "node",
    "leader",
    "keeper",
    "opening",
    "replica",
    "classic",
    "task",
    "local_lighthouse",
    "local_daemon",
    "local_run",
    "incidents",
    "weights",
    "tail",
    "groups",
    "stalls",
    "contacts",
    "observed",
    "outages",
    "quorums",
    "state",
    "remedies",
    "findings",
    "snapshot",
    "folding",
    "sources",
    "witness",
    "watcher",
    "history",
    "words",
    "digest",
    "pictures",
    "page",
    "report",
    "publish",
    "verdict",
    "sinks",
    "alarms",
    "prometheus",
    "wandb_sink",
    "outlets",
    "screen",
    "monitor",
    "care",
    "guardian",
    "interrupts",
    "live",
    "run_lighthouse",
    "handover",
    "submission",
    "runs",
    "jobs",
    "packages",
    "dashboard",
    "namespaces",
    "slurm_conf",
    "sandbox",
    "hands",
    "stages",
    "demo",
    "checks",
    "target",
    "listener",
    "doctor_node",
    "doctor_job",
    "surroundings",
    "checks_here",
    "checks_slurm",
    "checks_training",
    "checks_node",
    "doctor",
    "drills",
    "inject",
    "drill_verdict",
    "drill",
    "growth",
    "soak_report",
    "soak",
    "drill_command",
    "lighthouse_cli",
    "drill_cli",
    "submit_cli",
    "doctor_cli",
    "cli",
    "__main__",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_every_header_line(script: Path) -> None:
    """sbatch ignores, in silence, each #SBATCH line after the first command."""
    lines = script.read_text().splitlines()
    command = next(
        (i for i, text in enumerate(lines) if text.strip() and text[0] != "#"), len(lines)
    )
    late = [i + 1 for i, text in enumerate(lines) if text.startswith("#SBATCH") and i > command]
    assert not late, f"#SBATCH after the first command (line {command + 1}): {late}"


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_job_scripts_keep_their_logs_over_a_requeue(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--exclusive", "--cpus-per-task=128"):
        assert f"#SBATCH {line}\n" in text
    for path in re.findall(r"#SBATCH --(?:output|error)=(\S+)/[^/]+\n", text):
        assert (REPOSITORY / path / ".gitkeep").exists(), "Slurm does not create this folder"


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("*.sh")), ids=lambda path: path.name)
def test_job_scripts_take_several_nodes(script: Path) -> None:
    """With a number of tasks in the header, sbatch cuts `--nodes=2` to one, with a mere warning."""
    text = script.read_text()
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n" in text
    assert not re.search(r"#SBATCH --(ntasks|gpus-per-task)=", text)


def imports(path: Path) -> set[str]:
    """Modules of the launcher that ``path`` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "launcher":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("launcher."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_go_one_way() -> None:
    modules = {path.stem: path for path in LAUNCHER.glob("*.py")}
    assert set(modules) == set(ORDER), "ORDER must name every module of the control plane"
    del modules["__init__"]  # the package's face: it gives what stands behind, when asked
    for name, path in modules.items():
        later = {other for other in imports(path) if ORDER.index(other) >= ORDER.index(name)}
        assert not later, f"{name} imports {later}, which stand after it"


def test_the_training_plane_knows_almost_nothing_of_the_control_plane() -> None:
    for path in (LAUNCHER / "train").glob("*.py"):
        assert imports(path) <= {"train", "parentage", "datafiles"}, path.name


def test_no_module_is_long() -> None:
    for path in LAUNCHER.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


@pytest.mark.parametrize(
    "command",
    [["--help"], ["lighthouse", "status"], ["monitor", "--once"], ["doctor", "--no-job"]],
)
def test_the_launchers_commands_never_import_torch(command: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher.cli import main\n"
        f"sys.argv = ['launcher', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'torchft', 'torchtitan', 'wandb'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={"TFT_OUTPUTS": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_names_a_machine_or_a_registry() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        path = REPOSITORY / name
        if path.is_file() and path != Path(__file__):
            text = path.read_text(errors="replace")
            assert f"{REPOSITORY}/" not in text, name
            assert "hf_" + "token=" not in text.lower(), name
