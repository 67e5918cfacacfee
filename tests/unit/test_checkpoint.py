"""Checkpoint folders: whole or not at all, checked, the last few kept. Torn and damaged ones are real files, cut."""

import io
import os
import pickle
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from async_rl.driver import checkpoint_folder
from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.runtime import manifest


def write_parts(folder, step):
    partial = checkpoint_folder.begin(folder, step)
    (partial / "inner").mkdir()
    contents = {"weights.distcp": os.urandom(5000), "inner/common.pt": b"state" * step}
    return partial, {name: manifest.write_file(partial / name, content) for name, content in contents.items()}


def write(folder, step, keep=3, scores=None):
    return checkpoint_folder.commit(*write_parts(folder, step), keep=keep, scores=scores)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_few_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008"]
    assert checkpoint_folder.latest_valid(tmp_path) == tmp_path / "step-000008"
    assert checkpoint_folder.step_of(tmp_path / "step-000008") == 8


def test_the_best_of_those_that_are_not_the_newest_is_kept_beside_them(tmp_path):
    """An evaluation beside rollouts ends after its checkpoint, so the newest has no score when it is written."""
    scores = {2: 0.5, 4: 0.7, 8: 0.7, 10: 0.9}  # that of step 6 was not evaluated
    kept = []
    for step in (2, 4, 6, 8, 10, 12):
        write(tmp_path, step, keep=1, scores={at: score for at, score in scores.items() if at < step})
        kept.append(names(tmp_path)[0])
    assert kept == ["step-000002"] + [f"best-step-{step:06d}" for step in (2, 4, 4, 4, 10)]
    assert names(tmp_path) == ["best-step-000010", "step-000012"]
    assert checkpoint_folder.best(tmp_path, scores) == tmp_path / "best-step-000010"
    assert checkpoint_folder.best(tmp_path, {12: 0.95, **scores}) == tmp_path / "step-000012"
    assert checkpoint_folder.best(tmp_path, {}) is None
    # A run is restored from the newest only: what was trained since the best one is forgotten.
    assert checkpoint_folder.oldest_step(tmp_path) == 12
    no_manifest(tmp_path / "step-000012")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        checkpoint_folder.latest_valid(tmp_path)
    assert checkpoint_folder.find_damage(tmp_path / "best-step-000010") is None, "async-rl export takes it"


def test_the_best_of_a_step_that_was_trained_again_is_replaced_and_one_too_many_is_removed(tmp_path):
    for best in ("best-step-000002", "best-step-000004"):
        write(tmp_path, 9).rename(tmp_path / best)
    old = write(tmp_path, 4)
    (old / "again").touch()
    write(tmp_path, 6, keep=1, scores={2: 0.1, 4: 0.2})
    assert names(tmp_path) == ["best-step-000004", "step-000006"]
    assert (tmp_path / "best-step-000004" / "again").exists()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 10_000_000):
        write(tmp_path, step, keep=9)
    assert checkpoint_folder.latest_valid(tmp_path).name == "step-10000000"


def cut(path):
    (path / "weights.distcp").write_bytes((path / "weights.distcp").read_bytes()[:-1])


def flip(path):
    content = bytearray((path / "weights.distcp").read_bytes())
    content[1234] ^= 1
    (path / "weights.distcp").write_bytes(content)


def remove(path):
    (path / "inner" / "common.pt").unlink()


def no_manifest(path):
    (path / manifest.NAME).unlink()


def half_a_manifest(path):
    (path / manifest.NAME).write_text((path / manifest.NAME).read_text()[:-20])


def without_sizes(path):
    (path / manifest.NAME).write_text('{"files": {"weights.distcp": {"bytes": 5}}}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "weights.distcp has 4999 bytes, 5000 were written"),
        (remove, "inner/common.pt is missing"),
        (no_manifest, "manifest.json: No such file"),
        (half_a_manifest, "manifest.json cannot be read"),
        (without_sizes, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_named_and_the_latest_valid_one_used(tmp_path, damage, words):
    write(tmp_path, 2)
    damage(write(tmp_path, 4))
    with capture_logs() as logged:
        assert checkpoint_folder.latest_valid(tmp_path) == tmp_path / "step-000002"
    (line,) = logged
    assert (line["event"], line["checkpoint"]) == ("checkpoint_damaged", str(tmp_path / "step-000004"))
    assert words in line["damage"]


def test_altered_content_is_found_when_the_files_are_loaded_and_the_checkpoint_passed_over(tmp_path):
    write(tmp_path, 2)
    flip(newest := write(tmp_path, 4))
    assert checkpoint_folder.latest_valid(tmp_path) == newest, "nothing was read"
    damage = manifest.find_altered(newest, manifest.read(newest))
    assert damage == "weights.distcp has another checksum than when it was written"
    assert manifest.find_altered(newest, {"gone": manifest.FileEntry(1, "")}) == "gone is missing"
    assert checkpoint_folder.latest_valid(tmp_path, {newest: damage}) == tmp_path / "step-000002"
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged: step-000004: weights.*; step-000002: x"):
        checkpoint_folder.latest_valid(tmp_path, {newest: damage, tmp_path / "step-000002": "x"})


def test_the_error_names_the_file_in_every_process():
    error = pickle.loads(pickle.dumps(CheckpointDamaged("runs/a/checkpoints/step-000004", "common.pt is missing")))
    assert (error.path, error.damage) == ("runs/a/checkpoints/step-000004", "common.pt is missing")
    assert str(error) == "checkpoint runs/a/checkpoints/step-000004 is damaged: common.pt is missing"


def test_the_process_that_makes_a_checkpoint_of_the_parts_reads_none_of_them(tmp_path, monkeypatch):
    partial, entries = write_parts(tmp_path, 4)
    opened, real = [], io.open

    def counting(path, mode="r", *arguments, **keywords):
        opened.append((os.path.basename(path), mode))
        return real(path, mode, *arguments, **keywords)

    monkeypatch.setattr("io.open", counting)  # what Path.open, read_bytes and read_text call
    monkeypatch.setattr(manifest, "checksum", lambda path: pytest.fail(f"{path} was read"))
    final = checkpoint_folder.commit(partial, entries, keep=3)
    assert opened == [("manifest.json", "wb")]
    assert checkpoint_folder.latest_valid(tmp_path) == final


@pytest.mark.parametrize("lost", [cut, remove])
def test_a_checkpoint_with_a_part_that_is_not_there_does_not_count(tmp_path, lost):
    """For example of a worker whose host has another folder under that name."""
    write(tmp_path, 2)
    partial, entries = write_parts(tmp_path, 4)
    lost(partial)
    with pytest.raises(CheckpointError, match=r"step-000004.partial: .* a file system that all hosts share"):
        checkpoint_folder.commit(partial, entries, keep=1)
    assert checkpoint_folder.latest_valid(tmp_path) == tmp_path / "step-000002"
    checkpoint_folder.begin(tmp_path, 6)
    assert not partial.exists(), "what was not finished is removed"


def test_a_file_that_could_not_be_written_whole_has_no_entry(tmp_path):
    with pytest.raises(OSError, match="No space left on device"):
        manifest.write_file(Path("/dev/full"), bytes(100_000))
    entry = manifest.write_file(tmp_path / "whole", memoryview(bytes(range(256)) * 1000))
    assert entry == (256_000, manifest.checksum(tmp_path / "whole"))
    assert entry.xxh3 == manifest.checksum_of((tmp_path / "whole").read_bytes())


def test_if_all_are_damaged_each_fault_is_named(tmp_path):
    cut(write(tmp_path, 2))
    remove(write(tmp_path, 4))
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged: step-000004: .*missing; .*02: .*bytes"):
        checkpoint_folder.latest_valid(tmp_path)


def test_one_that_is_being_written_is_not_there_yet(tmp_path):
    write(tmp_path, 2)
    (checkpoint_folder.begin(tmp_path, 4) / "weights.distcp").write_bytes(b"half")
    assert checkpoint_folder.latest_valid(tmp_path) == tmp_path / "step-000002"
    assert write(tmp_path, 4).name == "step-000004"  # what was left of the first attempt is not in the way
    assert checkpoint_folder.find_damage(tmp_path / "step-000004") is None
    assert not list(tmp_path.glob("*.partial"))


def test_no_checkpoint_is_no_fault(tmp_path):
    assert checkpoint_folder.latest_valid(tmp_path / "none") is None
    (tmp_path / "final").mkdir()
    assert checkpoint_folder.latest_valid(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        checkpoint_folder.step_of(tmp_path / "final")
