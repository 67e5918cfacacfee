"""A full disk under the run folder: one line that says which file and what to do, and no record that is half there.

The queue's journal is in test_journal.py, checkpoints are in test_checkpointer.py and test_trainer_checkpoint.py.
"""

import contextlib
import json
import logging
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError
from structlog.testing import capture_logs

from async_rl.config.loading import validate
from async_rl.driver import run
from async_rl.errors import ResourceError
from async_rl.metrics import timeline
from async_rl.metrics.timeline import Timeline
from async_rl.runtime import logs
from async_rl.runtime.failures import explain
from async_rl.runtime.rolling import RollingLines, open_part, parts
from tests.support.full_disk import room_for


def line(step):
    return json.dumps({"step": step, "text": "x" * 50})


def test_a_line_for_which_there_is_no_room_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = RollingLines(path)
    lines.append(line(1))
    before = path.read_bytes()
    with room_for(len(before) + 5):
        for _ in range(2):
            with pytest.raises(OSError, match="File too large") as failed:
                lines.append(line(2))
            assert failed.value.filename == str(path)
        lines.close()
    assert path.read_bytes() == before
    lines.append(line(3))  # there is room again
    lines.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 3]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_that_cannot_be_compressed_stays_as_it_is_until_the_next(tmp_path):
    path = tmp_path / "trained.jsonl"
    lines = RollingLines(path, max_bytes=100)
    lines.append(line(1))
    lines.append(line(2))
    lines.close()
    lines.append(line(3))
    (tmp_path / "trained-000002.jsonl.tmp").mkdir()  # it cannot be written
    lines.append(line(4))
    lines.close()
    assert [part.name for part in parts(path)] == ["trained-000001.jsonl.gz", "trained-000002.jsonl"]
    (tmp_path / "trained-000002.jsonl.tmp").rmdir()
    lines.append(line(5))
    lines.append(line(6))
    lines.close()
    assert [part.suffix for part in parts(path)] == [".gz"] * 3
    texts = [text for part in parts(path) for text in open_part(part)]
    assert [json.loads(text)["step"] for text in texts] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("in_an_actor", [False, True])
def test_the_failure_names_the_file_and_what_to_set(tmp_path, in_an_actor):
    error = OSError(28, "No space left on device", "/data/runs/x/metrics.jsonl")
    if in_an_actor:
        error = RayTaskError("run", "Traceback ...\nOSError: ...", error).as_instanceof_cause()
    failure = explain(error, tmp_path)
    assert isinstance(failure, ResourceError)
    assert str(failure) == (
        "/data/runs/x/metrics.jsonl: No space left on device; make room there, or move the run folder to another disk "
        "and set `runs` to its place; then continue the run with --resume auto"
    )
    assert str(explain(OSError(28, "No space left on device"), tmp_path)).startswith(f"{tmp_path}: No space left")
    assert str(explain(OSError(5, "I/O error", "f"), tmp_path)) == "OSError: [Errno 5] I/O error: 'f'"


def test_a_run_goes_on_without_spans_that_cannot_be_written(tmp_path, monkeypatch):
    now = iter(range(10, 1000, 10))
    monkeypatch.setattr(timeline.time, "time", lambda: float(next(now)))
    spans = Timeline(tmp_path, "rollout-0", 10_000)
    spans.add("call", 0.1, tokens=1)
    path = tmp_path / "timeline" / "rollout-0.jsonl"
    with capture_logs() as found, room_for(path.stat().st_size + 5):
        for _ in range(3):
            spans.add("call", 0.1, tokens=2)
    spans.add("call", 0.1, tokens=3)
    spans.close()
    assert [(entry["event"], entry["path"], entry["reason"]) for entry in found] == [
        ("timeline_ended", str(path), "File too large")
    ]
    assert json.loads(path.read_text().splitlines()[0])["tokens"] == 1


def test_a_log_that_cannot_be_written_is_one_line_and_no_traceback(tmp_path, capsys):
    handler = logs._rotating(tmp_path / "rollout-0.jsonl")
    with room_for(100):
        for number in range(20):
            handler.handle(logging.makeLogRecord({"msg": f"line {number:030}"}))
    assert capsys.readouterr().err == (
        f"async-rl: {tmp_path}/rollout-0.jsonl: File too large; lines are lost until there is room\n"
    )
    handler.close()


class Summary:
    """The records of a run whose summary cannot be written."""

    checkpoints = None

    def __init__(self, *_, **__):
        self.finished = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Close nothing."""

    def finish(self, reason):
        raise OSError(28, "No space left on device", "summary.json")

    def announce_ray_exporters(self, _):
        """There are none."""

    def record_bad_rows(self):
        """There are none."""


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (OSError(28, "No space left on device", "metrics.jsonl"), r"metrics\.jsonl: No space left"),
        (None, r"summary\.json: No space left"),
    ],
)
def test_a_summary_that_cannot_be_written_hides_no_failure_and_is_one(monkeypatch, tmp_path, training, says):
    def train(*_, **__):
        if training is not None:
            raise training

    nothing = contextlib.nullcontext()
    parts_of_a_run = {
        "Recorder": Summary, "prepare_store": lambda *_, **__: None, "ray_exporters": list, "_train": train,
        "ray_cluster": lambda _: nothing, "courier": lambda _: nothing,
        "logs": SimpleNamespace(configure=lambda *_, **__: None),
    }  # fmt: skip
    for name, part in parts_of_a_run.items():
        monkeypatch.setattr(run, name, part)
    config = validate({"runs": str(tmp_path), "model": {"path": "m"}, "data": {"train": "d"}})
    inputs = SimpleNamespace(result=lambda: SimpleNamespace(bad_rows={}))
    with pytest.raises(ResourceError, match=says):
        run._record(config, 0.0, inputs, resume=False)
