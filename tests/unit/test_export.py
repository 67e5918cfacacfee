"""What ``async-rl export`` finds: the checkpoint, and the model that the run began with."""

import pytest

from async_rl.config.loading import validate
from async_rl.driver import export as exporting
from async_rl.driver.export import _with_model, export, find
from async_rl.errors import CheckpointError


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/final"])
def test_a_run_with_its_final_model_only_says_where_that_is(tmp_path, named):
    final = tmp_path / "run" / "checkpoints" / "final"
    final.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor a run folder"):
        find(tmp_path / named)
    (final / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"already as a Hugging Face folder: {final}"):
        find(tmp_path / named)


def test_a_relative_model_path_holds_where_the_run_was_started(tmp_path, monkeypatch):
    started, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    checkpoint = started / "out" / "runs" / "demo" / "checkpoints" / "step-000020"
    checkpoint.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = validate({"name": "demo", "runs": "out/runs", "model": {"path": "models/a"}, "data": {"train": "t"}})
    with pytest.raises(CheckpointError, match=r"model\.path models/a, .* --model\.path FOLDER"):
        _with_model(config, checkpoint)
    (started / "models" / "a").mkdir(parents=True)
    assert _with_model(config, checkpoint).model.path == started / "models" / "a"
    (elsewhere / "models" / "a").mkdir(parents=True)
    assert str(_with_model(config, checkpoint).model.path) == "models/a"


def test_a_model_that_has_moved_with_its_run_is_found_by_export(tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    checkpoint, model = moved / "runs" / "demo-2" / "checkpoints" / "step-000020", moved / "models" / "a"
    checkpoint.mkdir(parents=True)
    model.mkdir(parents=True)
    settings = f"name: demo\nruns: {tmp_path}/project/runs\nmodel: {{path: {tmp_path}/project/models/a}}\n"
    (checkpoint / "config.yaml").write_text(f"{settings}data: {{train: t}}\n")
    written = []
    monkeypatch.setattr(exporting, "find", lambda path, damaged: checkpoint)
    monkeypatch.setattr(exporting, "_write", lambda config, source, out: written.append(config.model.path))
    assert export(moved / "runs" / "demo-2", tmp_path / "out") == checkpoint
    assert written == [model]
    model.rmdir()
    with pytest.raises(CheckpointError, match=r"project/models/a, .* --model\.path FOLDER"):
        export(moved / "runs" / "demo-2", tmp_path / "out")
