"""Layers of settings: what wins, where it was said, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import layers
from launcher.layers import resolve
from launcher.model import UsageError
from launcher.settings import SETTINGS
from launcher.variables import VARIABLES
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flag_over_environment_over_run_file_over_profile_over_default(tmp_path: Path) -> None:
    profile = write(tmp_path / "p.yaml", "partition: p\nqos: p\naccount: p\ninterface: p\n")
    run = write(tmp_path / "r.yaml", f"profile: {profile}\npartition: r\nqos: r\naccount: r\n")
    env = {"SBATCH_PARTITION": "e", "SBATCH_QOS": "e"}
    found = resolve({"partition": "f"}, env, run_file=run)
    said = {key: (value, source) for key, value, source in found.explain()}
    assert said["partition"] == ("f", "command line")
    assert said["qos"] == ("e", "$SBATCH_QOS")
    assert said["account"] == ("r", f"{run}:4")
    assert said["interface"] == ("p", f"{profile}:4")
    assert said["device"] == ("cuda", "default")


def test_a_profile_is_named_on_the_command_line_or_in_the_environment_or_in_the_run_file(
    tmp_path: Path,
) -> None:
    run = write(tmp_path / "r.yaml", "profile: soperator\n")
    assert resolve({}, {}, run_file=run).get("partition") == "main"
    assert resolve({}, {"TFT_PROFILE": "h100"}, run_file=run).get("partition") == "h100"
    named = resolve({}, {"TFT_PROFILE": "h100"}, run_file=run, profile="sandbox")
    assert named.get("device") == "cpu"
    assert resolve({}, {"TFT_PROFILE": "sandbox"}).get("device") == "cpu"


def test_flags_and_variables_of_all_layers_add_up_the_strongest_last(tmp_path: Path) -> None:
    run = write(
        tmp_path / "r.yaml",
        "flags: [--training.steps, '5']\nvariables: {NCCL_DEBUG: INFO, A: file}\n",
    )
    env = {"TFT_EXTRA_ARGS": "--training.seq_len '64 '"}
    found = resolve({"flags": ["--training.steps", "9"]}, env, run_file=run)
    words = ["--training.steps", "5", "--training.seq_len", "64 ", "--training.steps", "9"]
    assert found.get("flags") == words
    handed = found.environment()
    assert handed["TFT_EXTRA_ARGS"].startswith("--training.steps 5 --training.seq_len '64 '")
    assert handed["NCCL_DEBUG"] == "INFO"


def test_a_zero_on_the_command_line_counts(tmp_path: Path) -> None:
    found = resolve({"spares": 0}, {"TFT_SPARES": "2"})
    assert found.environment()["TFT_SPARES"] == "0"


def test_every_problem_is_told_at_once_with_file_and_line(tmp_path: Path) -> None:
    bad = write(
        tmp_path / "bad.yaml",
        "partion: x\n"
        "time_limit: 10\n"
        "spares: 1\n"
        "spares: 3\n"
        "replicas: 3\n"
        "variables: {TFT_WARN: '1', HF_TOKEN: x, 'a b': c}\n"
        "sbatch_flags: [--array=1, nonsense]\n"
        "lighthouse_ports: 29510-29511\n",
    )
    with pytest.raises(UsageError) as caught:
        resolve({"max_replicas": 0}, {"TFT_SPARES": "x"}, profile=str(bad))
    said = str(caught.value)
    for words in (
        "--max-replicas must be a whole number from 1 up, not 0",
        "TFT_SPARES: must be a whole number, not 'x'",
        f"{bad}:1: partion is not a setting: did you mean partition?",
        f"{bad}:2: time_limit must be a time as sbatch takes it, in quotes",
        f"{bad}:4: spares is said twice (line 3)",
        f"{bad}:5: replicas is a run's own, not a cluster's",
        f"{bad}:6: variables: TFT_WARN is not a variable of this kit: did you mean TFT_WARM?",
        f"{bad}:6: variables: HF_TOKEN is a secret",
        f"{bad}:6: variables: 'a b' is not the name of a variable",
        f"{bad}:7: sbatch_flags: '--array=1' cannot be given: the launcher sets --array itself",
        f"{bad}:7: sbatch_flags: 'nonsense' cannot be given",
        f"{bad}:8: lighthouse_ports: 29510-29511 is no range of at least nine ports",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must be keys and values"),
        ("a: &a {x: 1}\n<<: *a\n", "<< is no text, as every key must be"),
        ("on: 1\n", "on is no text"),
        ("010: 3\n", "010 is no text"),
        ("partition: " + "[" * 1000, "not valid YAML"),
        ("variables: {TFT_MAX_REPLICAS: '8'}\n", "cannot be set here: say max_replicas"),
        ("variables: {TFT_RUN: tft-1}\n", "TFT_RUN cannot be set here"),
        ("variables: {AWS_ACCESS_KEY_ID: x}\n", "is a secret"),
        ("sbatch_flags: [-a0-9]\n", "flags begin with --"),
        ("sbatch_flags: [--arr=0-9]\n", "the launcher sets --array itself"),
        ("sbatch_flags: [--wait]\n", "the launcher sets --wait itself"),
        ("just words\n", "must be keys and values"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("comment: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve({}, {}, profile=str(write(tmp_path / "p.yaml", text)))


def test_a_secret_is_not_shown_also_where_another_variable_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "variables: {HF_TOKEN: hf_abc, OMP_NUM_THREADS: 8}\n")
    with pytest.raises(UsageError) as caught:
        resolve({}, {}, profile=str(path))
    assert "hf_abc" not in str(caught.value)


def test_what_only_looks_like_a_secret_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "variables: {TOKENIZERS_PARALLELISM: 'false'}\n")
    assert resolve({}, {}, profile=str(path)).environment() == {"TOKENIZERS_PARALLELISM": "false"}


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean h100"):
        resolve({}, {}, profile="h10")


@pytest.mark.parametrize("path", sorted(layers.PROFILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_profiles_are_valid(path: Path) -> None:
    found = resolve({}, {}, profile=path.stem)
    assert found.get("gpus_per_node") == 8
    assert all(flag.startswith("--") for flag in found.sbatch_flags())


def test_a_text_of_any_kind_reaches_the_tasks_as_it_is(tmp_path: Path) -> None:
    nasty = "a b'c\"d$(touch x)`y`\nz é 漢"
    found = resolve({"config": nasty, "flags": [nasty]}, {})
    handed = found.environment()
    assert handed["TFT_CONFIG"] == nasty
    again = resolve({}, handed)
    assert again.get("flags") == [nasty]


def test_names_are_one_line() -> None:
    with pytest.raises(UsageError, match="--name must be text in one line"):
        resolve({"name": "a\nb"}, {})


def test_every_setting_is_documented_and_its_variable_known() -> None:
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    known = {variable.name for variable in VARIABLES}
    for setting in SETTINGS:
        assert f"| `{setting.key}` |" in text, setting.key
        assert setting.meaning
        if setting.variable.startswith("TFT_"):
            assert setting.variable in known
