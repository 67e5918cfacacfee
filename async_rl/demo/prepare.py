"""The hook that puts the demo's model and datasets where a config wants them; a config names it in its ``prepare`` key.

When something is made again, and what is left alone: see ``made``. Knows the other modules of this room, ``config`` and
``errors``.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint, made, task
from async_rl.errors import ModelError


def prepare(config: RunConfig) -> None:
    """Make model.path, data.train and data.eval unless they are there. A second call returns at once.

    Lists of files are the user's own, and left alone.

    Raises ModelError when the package's checkpoint is missing or damaged. Nothing is left half-done then.
    """
    made.make_inputs(config, _recipe(), model=_unpack, sets=task.train_and_eval, write=task.write_jsonl)


def _recipe() -> str:
    return made.recipe_of([*Path(__file__).parent.glob("*.py"), *checkpoint.FOLDER.glob("*")])


def _unpack(folder: Path) -> None:
    folder.mkdir()
    try:
        checkpoint.unpack(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the demo's checkpoint cannot be read from the package: {error}; install the package again, or make the "
            "checkpoint with python -m async_rl.demo.warmup"
        ) from error
