"""Checkpoint folders: whole or not at all, checked, the last few kept. Torn and damaged ones are real files, cut."""

import os

import pytest
from structlog.testing import capture_logs

from async_rl.driver import checkpoint_folder
from async_rl.errors import CheckpointError


def write(folder, step, keep=3):
    partial = checkpoint_folder.begin(folder, step)
    (partial / "inner").mkdir()
    (partial / "weights.distcp").write_bytes(os.urandom(5000))
    (partial / "inner" / "common.pt").write_bytes(b"state" * step)
    return checkpoint_folder.commit(partial, keep=keep)


def test_the_newest_few_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008"]
    assert checkpoint_folder.latest_valid(tmp_path) == tmp_path / "step-000008"
    assert checkpoint_folder.step_of(tmp_path / "step-000008") == 8


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
    (path / checkpoint_folder.MANIFEST).unlink()


def half_a_manifest(path):
    (path / checkpoint_folder.MANIFEST).write_text((path / checkpoint_folder.MANIFEST).read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "weights.distcp has 4999 bytes, 5000 were written"),
        (flip, "weights.distcp has another checksum"),
        (remove, "inner/common.pt is missing"),
        (no_manifest, "manifest.json: No such file"),
        (half_a_manifest, "manifest.json cannot be read"),
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
