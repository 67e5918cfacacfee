"""``async-rl export``: writes a checkpoint, which any trainer layout may have saved, as a Hugging Face folder.

Runs in one process, also for a checkpoint of GPUs on a machine without any, and copies parameter by parameter: it needs
memory for one of the files that it writes. Needs neither Ray, an engine nor Megatron.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_rl.config.loading import load
from async_rl.config.schema import RunConfig
from async_rl.driver import checkpoint_folder
from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.models.config import read_model_config
from async_rl.runtime import manifest

FINAL = "final"
"""Folder, next to the checkpoints, of the model that a finished run has exported."""


def export(path: Path, out: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write the model of ``path``, a checkpoint or a run folder, to ``out``. Returns the checkpoint that was used.

    overrides: dotted settings that win over those of the run, for example if the model's folder has moved. Raises
    CheckpointError if the checkpoint is damaged, or there is none.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; name another one")
    damaged: dict[Path, str] = {}
    while True:
        source = find(path, damaged)
        try:
            _write(_with_model(load(source / "config.yaml", overrides), source), source, out)
        except CheckpointDamaged as error:
            if source == path:
                raise
            damaged[source] = error.damage
        else:
            return source


def find(path: Path, damaged: Mapping[Path, str] | None = None) -> Path:
    """Return ``path`` if it is a checkpoint, or the latest one that is not ``damaged`` if it is a run folder."""
    if (path / manifest.NAME).is_file():
        damage = checkpoint_folder.find_damage(path)
        if damage is not None:
            raise CheckpointDamaged(str(path), damage)
        return path
    folders = (path / "checkpoints", path)
    newest = next(filter(None, (checkpoint_folder.latest_valid(folder, damaged) for folder in folders)), None)
    if newest is None:
        finals = (path, path / FINAL, path / "checkpoints" / FINAL)
        if final := next((folder for folder in finals if (folder / "config.json").is_file()), None):
            raise CheckpointError(f"{path} has the trained model already as a Hugging Face folder: {final}; copy that")
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run folder with checkpoints; set checkpoint.every to write some"
        )
    return newest


def _write(config: RunConfig, source: Path, out: Path) -> None:
    from async_rl.trainer.export import write_folder
    from async_rl.trainer.megatron.checkpoint_weights import CheckpointWeights

    altered = manifest.find_altered(source, manifest.read(source))
    if altered is not None:
        raise CheckpointDamaged(str(source), altered)
    model = read_model_config(config.model.path)
    weights = CheckpointWeights(source, model, config.model.dtype)
    write_folder(weights, out, like=config.model.path, model=model)


def _with_model(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Return ``config`` with a model.path that holds here, or beside the run folder if both have moved together.

    Runs of release 0.1 recorded relative paths, below the folder in which they were started. Raises CheckpointError if
    the model is at neither place.
    """
    model, recorded = config.model.path, config.run_dir
    if not model.is_dir() and model.is_absolute() == recorded.is_absolute():
        run = checkpoint.absolute().parent.parent
        model = Path(os.path.normpath(run / os.path.relpath(model, recorded)))
    if not model.is_dir():
        raise CheckpointError(
            f"{checkpoint} is of a run with model.path {config.model.path}, and there is no such folder; say where the "
            "model that the run began with is: --model.path FOLDER"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
