"""Run folders are read as they stand: whole, growing, cut off, rewound, damaged, of another format."""

import json
import logging
import os

import pytest

from async_rl.config.loading import validate
from async_rl.errors import RunFolderError
from async_rl.metrics.publish import step_row
from async_rl.observe import history
from async_rl.runtime import logs
from async_rl.runtime.runfolder import RunFolder
from tests.support.step_records import step_record


@pytest.fixture
def folder(tmp_path):
    tree = {"name": "demo", "runs": str(tmp_path), "model": {"path": "m"}, "data": {"train": "t"}}
    with RunFolder(validate(tree | {"trainer": {"steps": 20}})) as folder:
        yield folder


def write(folder, *steps):
    for step in steps:
        folder.write_step(step_row(step_record(step=step)))


def steps(found):
    return [row["step"] for row in found.rows]


def test_a_run_that_goes_on_is_read_as_far_as_it_has_come(folder):
    found = history.read(folder.path)
    assert (found.name, found.steps, found.rows, found.summary, found.running) == ("demo", 20, [], None, True)
    write(folder, 1, 2)
    found.refresh()
    assert steps(found) == [1, 2]
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "rew')
        stream.flush()
        found.refresh()
        assert steps(found) == [1, 2]  # a line that is being written
        stream.write('ard_mean": 0.5}\n')
        stream.flush()
        found.refresh()
        assert steps(found) == [1, 2, 3]
    folder.write_summary({"exit_reason": "finished"})
    found.refresh()
    assert (found.summary, found.running) == ({"exit_reason": "finished"}, False)


def test_a_run_that_was_killed_does_not_run(folder):
    write(folder, 1)
    folder._lock.close()
    found = history.read(folder.path)
    assert (found.running, found.summary) == (False, None)


def test_looking_never_takes_the_lock(folder):
    """A run that is gone on with at the moment of a look must not find its folder locked."""
    before = (folder.path / "lock").stat()
    assert history.read(folder.path).running
    assert os.path.samestat(before, (folder.path / "lock").stat())
    folder._lock.close()
    found = history.read(folder.path)
    again = RunFolder(validate({"name": "demo", "runs": str(folder.path.parent), "model": {"path": "m"},
                                "data": {"train": "t"}}), resume=True)  # fmt: skip
    found.refresh()
    assert found.running
    again.close()


def test_training_that_goes_back_takes_its_lines_along(folder):
    write(folder, 1, 2, 3, 4)
    found = history.read(folder.path)
    folder.rewind(2)
    write(folder, 3)
    found.refresh()
    assert steps(found) == [1, 2, 3]


def test_a_file_that_was_cut_and_has_grown_past_its_old_size_is_read_again(folder):
    write(folder, 1, 2, 3, 4)
    found = history.read(folder.path)
    folder.rewind(2)
    write(folder, 3, 4, 5)
    found.refresh()
    assert steps(found) == [1, 2, 3, 4, 5]
    folder.rewind(4)
    found.refresh()
    assert steps(found) == [1, 2, 3, 4]


def test_events_of_a_log_that_was_rolled_come_once_and_in_order(folder, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 600)
    log = logs._rotating(folder.path / "logs" / "pipeline.jsonl")
    found, written = history.read(folder.path), 0

    def emit(count):
        nonlocal written
        for _ in range(count):
            written += 1
            log.emit(logging.makeLogRecord({"msg": json.dumps({"event": "checkpoint", "n": written})}))

    for count in (1, 4, 1, 12, 3):
        emit(count)
        found.refresh()
        assert [event.text for event in found.events] == [f"checkpoint n={n + 1}" for n in range(written)]
    assert [event.text for event in history.read(folder.path).events] == [event.text for event in found.events]
    emit(400)  # more than are kept, since the last look
    found.refresh()
    numbers = [int(event.text.partition("n=")[2]) for event in found.events]
    assert numbers == list(range(numbers[0], written + 1))
    log.close()


def test_events_are_of_the_pipelines_log(folder):
    line = {
        "event": "rollout-0 is back",
        "level": "warning",
        "timestamp": "2026-01-02T03:04:05Z",
        "run": "demo",
        "n": 3,
    }
    (folder.path / "logs" / "pipeline.jsonl").write_text(json.dumps(line) + "\n")
    (event,) = history.read(folder.path).events
    assert (event.text, event.level, event.time) == ("rollout-0 is back n=3", "warning", 1767323045.0)


def test_what_is_no_run_folder_is_said_so(folder, tmp_path):
    with pytest.raises(RunFolderError, match=r"there is no run folder .*demos; .* has demo$"):
        history.read(tmp_path / "demos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"is no run folder: it has no config\.yaml"):
        history.read(tmp_path / "empty")
    (folder.path / "format").write_text("2\n")
    with pytest.raises(RunFolderError, match="of format 2, and this version reads 1; use the version"):
        history.read(folder.path)
    (folder.path / "format").unlink()
    with pytest.raises(RunFolderError, match="of format None"):
        history.read(folder.path)
    (folder.path / "config.yaml").write_text("- 1\n")
    with pytest.raises(RunFolderError, match=r"config\.yaml is not what a run writes"):
        history.read(folder.path)


def test_damage_in_the_middle_is_named(folder):
    write(folder, 1)
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write("{]\n")
    write(folder, 2)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is not a JSON object: b'\{\]'"):
        history.read(folder.path)
