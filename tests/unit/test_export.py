"""What ``async-rl export`` finds: the checkpoint, and the model that the run began with."""

import pytest

from async_rl.config.loading import validate
from async_rl.driver.export import _with_model, find
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
