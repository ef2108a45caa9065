from pathlib import Path

import pytest

from launcher.config import Site
from launcher.model import UsageError
from launcher.variables import VARIABLES
from tests.conftest import REPOSITORY


def test_defaults() -> None:
    site = Site.from_environment({})
    assert site.config == Path("configs/llama3.1-8b.toml")
    assert (site.ranks_per_node, site.device, site.extra_args) == (8, "cuda", ())


def test_ranks_follow_the_tasks_gpus_unless_set() -> None:
    assert Site.from_environment({"SLURM_GPUS_ON_NODE": "4"}).ranks_per_node == 4
    env = {"SLURM_GPUS_ON_NODE": "4", "TFT_RANKS_PER_NODE": "2"}
    assert Site.from_environment(env).ranks_per_node == 2


def test_extra_args_are_shell_quoted() -> None:
    site = Site.from_environment({"TFT_EXTRA_ARGS": "--job.description 'two words' --a.b=1"})
    assert site.extra_args == ("--job.description", "two words", "--a.b=1")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"TFT_RANKS_PER_NODE": "0"}, "TFT_RANKS_PER_NODE"),
        ({"TFT_RANKS_PER_NODE": "two"}, "TFT_RANKS_PER_NODE"),
        ({"TFT_DEVICE": "tpu"}, "'cuda' or 'cpu'"),
        ({"TFT_EXTRA_ARGS": "--x 'open"}, "well-quoted"),
        ({"TFT_EXTRA_ARGS": "--fault_tolerance.group_size=3"}, "must not set"),
        ({"TFT_EXTRA_ARGS": "--fault-tolerance.replica-id 3"}, "must not set"),
        ({"TORCHFT_LIGHTHOUSE": "login-0:29510"}, "http://host:29510"),
        ({"TORCHFT_QUORUM_RETRIES": "many"}, "TORCHFT_QUORUM_RETRIES"),
        ({"TFT_CONFGI": "x"}, "did you mean TFT_CONFIG"),
        ({"TFT_MIN_STEP_SECONDS": "-1"}, "TFT_MIN_STEP_SECONDS"),
        ({"TFT_DATALOADER_SAVE_EVERY": "0"}, "at least 1"),
    ],
)
def test_bad_values_are_named(env: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Site.from_environment(env)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Site.from_environment({"TFT_DEVICE": "tpu", "TFT_RANKS_PER_NODE": "x"})
    assert "TFT_DEVICE" in str(caught.value)
    assert "TFT_RANKS_PER_NODE" in str(caught.value)


def test_the_readme_documents_every_variable_with_its_default() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for variable in VARIABLES:
        row = next((r for r in readme.splitlines() if r.startswith(f"| `{variable.name}`")), None)
        assert row is not None, f"README.md has no row for {variable.name}"
        assert variable.meaning in row
        assert (variable.default or "(none)") in row
