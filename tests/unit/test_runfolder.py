"""The run folder: its layout, what is refused, and that what is written is whole and valid JSON."""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest

from async_rl.config.loading import load, validate
from async_rl.errors import ConfigError
from async_rl.metrics import timeline
from async_rl.metrics.timeline import Timeline
from async_rl.runtime import logs, runfolder
from async_rl.runtime.rolling import open_part, parts
from async_rl.runtime.runfolder import RunFolder, to_json


def config(runs: Path, **sections):
    return validate({"model": {"path": "m"}, "data": {"train": "t"}, "runs": str(runs), "name": "demo", **sections})


@pytest.fixture
def folder(tmp_path):
    with RunFolder(config(tmp_path, debug={"dump_trajectories": 2})) as folder:
        yield folder


def lines(path: Path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_layout_and_resolved_config(tmp_path, folder):
    assert folder.path == tmp_path / "demo"
    assert all(path.is_dir() for path in (folder.logs, folder.checkpoints, folder.targets, folder.trajectories))
    assert load(folder.path / "config.yaml") == config(tmp_path, debug={"dump_trajectories": 2})


def test_a_second_run_of_that_name_is_refused_and_nothing_touched(tmp_path, folder):
    folder.write_step({"step": 1})
    before = sorted(folder.path.rglob("*"))
    with pytest.raises(ConfigError, match=r"name: 'demo' is taken.*give another --name"):
        RunFolder(config(tmp_path))
    assert sorted(folder.path.rglob("*")) == before
    assert lines(folder.path / "metrics.jsonl") == [{"step": 1}]


def test_an_empty_folder_is_no_run(tmp_path):
    (tmp_path / "demo").mkdir()
    RunFolder(config(tmp_path)).close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="runs: cannot make the run folder"):
        RunFolder(config(tmp_path / "file"))


def test_each_line_is_on_disk_once_written(folder):
    folder.write_step({"step": 1, "loss": 0.5})
    assert lines(folder.path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    folder.write_step({"step": 2, "loss": math.nan})
    assert lines(folder.path / "metrics.jsonl")[1] == {"step": 2, "loss": None}


def test_any_text_is_one_line_and_comes_back(folder):
    texts = [
        "line\nbreak",
        "\u2028 \u2029 \x85 \x0b",
        "\U0001f600 日本",
        "lone \ud800 surrogate",
        'quote " \\ \\u2028',
    ]
    for text in texts:
        folder.write_sample({"response": text})
    folder.write_summary({"exit_reason": texts[3]})
    assert [line["response"] for line in lines(folder.path / "samples.jsonl")] == texts
    assert "日本" in (folder.path / "samples.jsonl").read_text()


def test_json_has_no_nan_and_takes_numpy():
    value = {
        "nan": math.nan,
        "nested": [math.inf, {"x": -math.inf}],
        3: np.float32(0.5),
        "array": np.array([1.0, np.nan]),
        "path": Path("a/b"),
        "flag": np.bool_(True),
        "tuple": (1, 2),
    }
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {
        "nan": None,
        "nested": [None, {"x": None}],
        "3": 0.5,
        "array": [1.0, None],
        "path": "a/b",
        "flag": True,
        "tuple": [1, 2],
    }


def test_summary_is_written_whole_or_not_at_all(folder, monkeypatch):
    folder.write_summary({"steps": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runfolder.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write_summary({"steps": 2})
    assert json.loads((folder.path / "summary.json").read_text()) == {"steps": 1}
    assert [path.name for path in folder.path.iterdir() if path.suffix == ".tmp"] == []


def test_the_last_groups_are_kept(folder):
    for number in range(5):
        folder.write_group(memoryview(bytes([number])), f"0-{number}.0")
    kept = {path.name: path.read_bytes() for path in folder.trajectories.iterdir()}
    assert kept == {"0-3.0.group": b"\x03", "0-4.0.group": b"\x04"}


def test_the_same_group_twice_counts_once(folder):
    for payload, name in ((b"a", "x"), (b"b", "y"), (b"c", "x")):
        folder.write_group(payload, name)
    assert {path.name: path.read_bytes() for path in folder.trajectories.iterdir()} == {
        "x.group": b"c",
        "y.group": b"b",
    }


def test_groups_that_an_earlier_process_kept_count_too(tmp_path, folder):
    for number in range(2):
        folder.write_group(b"x", f"0-{number}.0")
        os.utime(folder.trajectories / f"0-{number}.0.group", (number, number))
    folder._lock.close()
    with RunFolder(config(tmp_path, debug={"dump_trajectories": 2}), resume=True) as again:
        again.write_group(b"x", "0-2.0")
    assert sorted(path.name for path in again.trajectories.iterdir()) == ["0-1.0.group", "0-2.0.group"]


def test_a_group_id_cannot_leave_the_folder(folder):
    folder.write_group(b"x", "../../escape")
    assert [path.name for path in folder.trajectories.iterdir()] == ["_.._escape.group"]


def test_without_dump_trajectories_nothing_is_kept(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.write_group(b"x", "0-1.0")
        assert list(folder.trajectories.iterdir()) == []


def test_a_run_that_has_not_ended_cannot_be_gone_on_with(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"name: the run 'demo' .*has not ended; wait for it, or give another --name"):
        RunFolder(config(tmp_path), resume=True)
    # Another process holds the lock as long as it lives, and no longer.
    folder._lock.close()
    beside = folder.path.parent / ".prometheus"
    beside.mkdir()
    for left in (folder.targets / "rollout.json", beside / "rollout@demo.json", beside / "rollout@other.json"):
        left.write_text("[]")  # of processes that were killed
    RunFolder(config(tmp_path), resume=True).close()
    assert list(folder.targets.iterdir()) == []
    assert [path.name for path in beside.iterdir()] == ["rollout@other.json"]


def test_going_back_keeps_what_was_written_of_later_steps_aside(folder):
    for step in range(1, 6):
        folder.write_step({"step": step, "loss": step})
        folder.write_trained({"step": step, "groups": [f"0-{step}.0"]})
        folder.write_sample({"step": step})
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the writer was killed
    folder.rewind(3)
    folder.write_step({"step": 4, "loss": -4})
    assert [row["loss"] for row in lines(folder.path / "metrics.jsonl")] == [1, 2, 3, -4]
    assert [row["step"] for row in lines(folder.path / "trained.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in lines(folder.path / "samples.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in lines(folder.path / "rewound-trained.jsonl")] == [4, 5]
    aside = (folder.path / "rewound-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside[:2]] == [4, 5]
    assert aside[2] == '{"step": 6, "lo'
    folder.rewind(1)
    assert [row["step"] for row in lines(folder.path / "rewound-trained.jsonl")] == [4, 5, 2, 3]


def test_invariant_6_the_files_of_20000_steps_stay_bounded(tmp_path, monkeypatch):
    """A run of weeks in seconds: sizes are a hundredth, time is virtual, every 1,500 steps the trainer is rewound."""
    monkeypatch.setattr(runfolder, "_TRAINED_BYTES", 160_000)
    monkeypatch.setattr(logs, "MAX_BYTES", 100_000)
    now = iter(range(10**6))
    monkeypatch.setattr(timeline.time, "time", lambda: float(next(now)))
    settings = config(tmp_path, metrics={"samples_bytes": 400_000, "timeline_bytes": 200_000})
    with RunFolder(settings) as folder:
        handlers = [logs._rotating(folder.logs / name) for name in ("pipeline.jsonl", "pipeline.libs.log")]
        spans = Timeline(folder.path, "pipeline", settings.metrics.timeline_bytes)
        step = written = highest = 0
        while step < 20_000:
            step, written = step + 1, written + 1
            folder.write_step({"step": step, "loss": 0.5})
            folder.write_trained({"step": step, "groups": [f"0-{step * 16 + n}.0" for n in range(16)]})
            folder.write_sample({"step": step, "response": "x" * 500})
            for handler in handlers:
                handler.emit(logging.makeLogRecord({"msg": f"a line of an ordinary length of step {step}"}))
            spans.add("update", 0.1, step=step)
            if written % 1_500 == 0:
                folder.rewind(step := step - 100)
            if written % 1_000 == 0:
                highest = max(highest, growing(folder.path))
        for open_file in (spans, folder, *handlers):
            open_file.close()
        trained = [json.loads(row)["step"] for part in parts(folder.path / "trained.jsonl") for row in open_part(part)]
        plain = 20_000 * len(to_json({"step": 20_000, "groups": [f"0-{10**5}.0"] * 16}))
        kept = sum(part.stat().st_size for part in parts(folder.path / "trained.jsonl"))
    assert trained == list(range(1, 20_001)), "of what was trained nothing is forgotten"
    assert kept < plain / 3
    assert [row["step"] for row in lines(folder.path / "metrics.jsonl")] == trained
    # Samples and those that were undone, two logs of four files each, spans; and what is written before a look.
    assert highest < 2 * 400_000 + 2 * 4 * 100_000 + 200_000 + 100_000


def growing(path: Path) -> int:
    """Return the bytes of all files of a run folder but those that keep one line of each step."""
    whole = [*parts(path / "trained.jsonl"), *parts(path / "rewound-trained.jsonl")]
    whole += [path / "metrics.jsonl", path / "rewound-metrics.jsonl"]
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file not in whole)
