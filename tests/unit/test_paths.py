"""Every setting that is a path is made absolute, also one that a section gains later."""

import os
from pathlib import Path

import pytest

from async_rl.config.fields import PathName, Section
from async_rl.config.loading import leaves, validate
from async_rl.config.paths import absolute, path_settings


class Inner(Section):
    """A section of a later release."""

    files: tuple[PathName, ...] = ()
    """Files."""


class Outer(Section):
    """The tree of a later release."""

    inner: Inner = Inner()
    name: str = "a/b"
    """A name."""


def tree(**sections):
    return validate({"model": {"path": "models/a"}, "data": {"train": "train.jsonl"}, **sections})


def test_every_path_of_the_tree_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tree(
        data={"train": "train.jsonl", "eval": "/data/eval.jsonl"},
        queue={"redis": {"password_file": "secret", "ca_file": None}},
    )
    found = dict(path_settings(absolute(given)))
    assert found == {
        "runs": tmp_path / "runs",
        "model.path": tmp_path / "models" / "a",
        "data.train": tmp_path / "train.jsonl",
        "data.eval": Path("/data/eval.jsonl"),
        "queue.redis.password_file": tmp_path / "secret",
    }
    assert absolute(given).run_dir == tmp_path / "runs" / "run"
    assert absolute(absolute(given)) == absolute(given)
    everything = {**given.model_dump(), "model": None, "data": None, "queue": None, "runs": None}
    made = {**absolute(given).model_dump(), "model": None, "data": None, "queue": None, "runs": None}
    assert made == everything
    assert set(dict(path_settings(given))) <= {key for key, _ in leaves()}


def test_a_path_that_a_section_gains_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    later = Outer(inner=Inner(files=("a", "/b")))
    assert [str(path) for _, path in path_settings(absolute(later))] == [str(tmp_path / "a"), "/b"]
    assert absolute(later).name == "a/b"


@pytest.mark.parametrize("joined", [None, "10.0.0.1:6379"])
def test_processes_of_a_run_get_absolute_paths(tmp_path, monkeypatch, joined):
    from async_rl import doctor
    from async_rl.driver.run import resolved

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "uses_gpu", lambda config: True)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    made = resolved(tree(cluster={"address": joined}), resume=False)
    assert all(path.is_absolute() for _, path in path_settings(made))
    assert made.run_dir == tmp_path / "runs" / "run-2"
    # The hosts of a cluster decide the device, not the driver's.
    assert made.resources.device == ("auto" if joined else "cuda")
    os.chdir("/")
    assert resolved(made, resume=True) == made
