import dataclasses
import json
import threading
from pathlib import Path

import pytest

from launcher.files import create_once, read_json
from launcher.model import KitError, UsageError
from launcher.rundir import Manifest, Outputs

MANIFEST = Manifest(run="tft-7", array_job_id=7, group_size=4, ranks_per_group=8, config="c.toml")


def test_the_manifest_is_written_once_by_whoever_comes_first(hostile: Path) -> None:
    run = Outputs(hostile).run_of_array(7)
    others = [dataclasses.replace(MANIFEST, group_size=n) for n in range(1, 9)]
    got: list[Manifest] = []
    threads = [threading.Thread(target=lambda m=m: got.append(run.create(m))) for m in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len({manifest.group_size for manifest in got}) == 1
    assert run.manifest() == got[0]
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]


def test_a_manifest_survives_the_round_trip_and_ignores_newer_fields(tmp_path: Path) -> None:
    run = Outputs(tmp_path).run_of_array(7)
    full = dataclasses.replace(
        MANIFEST,
        extra_args=("--a", "b c"),
        script="my train.py",
        script_args=("$(x)", "ü\n"),
        settings={"model": {"name": "x"}},
    )
    assert run.create(full) == full
    text = run.manifest_path.read_text().replace("{", '{"of_a_later_version": 1,', 1)
    run.manifest_path.write_text(text)
    assert run.manifest() == full


def test_a_manifest_from_before_there_were_scripts_is_of_torchtitan(tmp_path: Path) -> None:
    run = Outputs(tmp_path).run_of_array(7)
    run.path.mkdir(parents=True)
    old = {"run": "tft-7", "array_job_id": 7, "group_size": 4, "ranks_per_group": 8, "config": "c"}
    run.manifest_path.write_text(json.dumps(old))
    assert (run.manifest().script, run.manifest().script_args) == ("", ())


def test_a_manifest_of_before_there_were_groups_of_several_nodes_is_read(tmp_path: Path) -> None:
    run = Outputs(tmp_path).run_of_array(7)
    run.create(MANIFEST)
    written = json.loads(run.manifest_path.read_text())
    del written["nodes_per_group"]
    run.manifest_path.write_text(json.dumps(written))
    assert (run.manifest().nodes_per_group, run.manifest().ranks_per_node) == (1, 8)


def test_every_node_of_a_group_has_its_own_events(tmp_path: Path) -> None:
    run = Outputs(tmp_path).run_of_array(7)
    names = [run.events(3, node).name for node in (0, 1)]
    assert names == ["tft-7_3.events.jsonl", "tft-7_3.node-1.events.jsonl"]


def test_runs_are_found_by_name_id_path_and_age(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    with pytest.raises(UsageError, match="no runs"):
        outputs.find(None)
    for number, created in ((9, 1.0), (7, 2.0)):
        outputs.run_of_array(number).create(
            dataclasses.replace(MANIFEST, run=f"tft-{number}", created=created)
        )
    assert outputs.find(None).name == "tft-7"
    for name in ("tft-9", "9", str(outputs.run_of_array(9).path)):
        assert outputs.find(name).name == "tft-9"
    with pytest.raises(UsageError, match=r"no run '11'.*tft-9, tft-7"):
        outputs.find("11")


def test_a_folder_that_cannot_be_written_is_an_error_that_says_where() -> None:
    with pytest.raises(KitError, match="cannot write /proc/nope"):
        create_once(Path("/proc/nope"), "x")


def test_broken_json_is_not_absence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_json(path) is None
    path.write_text('{"half": ')
    with pytest.raises(KitError, match="cannot be read"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(KitError, match="not a JSON object"):
        read_json(path)
