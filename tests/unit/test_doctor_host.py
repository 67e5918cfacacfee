"""What a host says of itself, for the comparison with the other hosts of a cluster."""

import json
import os
import sys

import pytest

from async_rl.doctor import host


def test_a_report_is_plain_data(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    token = tmp_path / ".probe-1"
    token.write_text(".probe-1")
    paths = {"data.train": str(tmp_path / "train.jsonl"), "model.path": str(tmp_path / "none")}
    report = host.look(paths, ["json", "no_such_module.inner"], str(token))
    assert json.loads(json.dumps(report)) == report
    assert report["python"].startswith("3.")
    assert report["packages"]["ray"] == "2.60.0"
    assert {"ray", "torch", "vllm", "megatron-core", "msgpack"} == report["packages"].keys()
    assert report["cores"] == len(os.sched_getaffinity(0))
    assert "127.0.0.1" in report["interfaces"]["lo"]
    assert report["paths"]["model.path"] is None
    assert list(report["paths"]["data.train"]) == [""]
    assert report["modules"]["no_such_module.inner"] is None
    assert report["modules"]["json"]
    assert report["shares_runs"]
    assert report["writes_runs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".probe-1", "train.jsonl"]


def test_another_file_system_does_not_have_the_token(tmp_path):
    elsewhere = tmp_path / "runs" / ".probe-1"
    report = host.look({}, [], str(elsewhere))
    assert (report["shares_runs"], report["writes_runs"]) == (False, False)
    elsewhere.parent.mkdir()
    elsewhere.write_text(".probe-0")  # of a run before
    assert not host.look({}, [], str(elsewhere))["shares_runs"]


def test_a_host_that_keeps_what_its_processes_write_is_tried(tmp_path):
    (tmp_path / "file").touch()
    assert host.look({}, [], "", str(tmp_path / "made"))["spool_fault"] == ""
    assert "nothing can be written to" in host.look({}, [], "", str(tmp_path / "file"))["spool_fault"]
    assert host.look({}, [], "")["spool_fault"] == "", "not tried where all hosts have the run folder"


def test_code_differs_with_any_source_file(tmp_path, monkeypatch):
    package = tmp_path / "async_rl"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(host.async_rl, "__file__", str(package / "__init__.py"))
    before = host.code()
    assert before == host.code()
    (package / "inner" / "a.py").write_text("x = 2\n")
    assert host.code() != before


@pytest.mark.parametrize("at", [0, 5 * 2**20, 10 * 2**20 - 1])
def test_a_model_is_compared_file_by_file_whenever_it_was_copied(tmp_path, at):
    folders = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(10 * 2**20))
        folders.append(folder)
    (tmp_path / "two" / ".lock").write_text("of this host alone")
    (tmp_path / "two" / "README.md").write_text("of this host alone")
    os.utime(tmp_path / "two" / "model.safetensors", (1, 1))
    one, two = map(host.files, folders)
    assert list(one) == ["config.json", "model.safetensors"]
    assert one == two
    with (tmp_path / "two" / "model.safetensors").open("r+b") as stream:
        stream.seek(at)
        stream.write(b"x")
    assert host.files(folders[1])["model.safetensors"] != one["model.safetensors"]
    assert host.files(folders[1])["config.json"] == one["config.json"]


def test_a_module_is_not_imported_to_be_compared(tmp_path, monkeypatch):
    (tmp_path / "costly_reward.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = host.module("costly_reward")
    assert first
    (tmp_path / "costly_reward.py").write_text("raise SystemExit(1)\n")
    assert host.module("costly_reward") not in (None, first)
    assert "costly_reward" not in sys.modules
