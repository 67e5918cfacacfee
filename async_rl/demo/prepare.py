"""The hook that puts the demo's model and datasets where a config wants them; a config names it in its ``prepare`` key.

Owns when something is made again: when it is missing, incomplete, or was made by another version of this package. A
file or folder without a record of this module belongs to the user and is left alone. Everything is built next to its
place and then renamed, so that no reader ever sees a half-written one. Knows the other modules of this room, ``config``
and ``errors``.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import structlog
from safetensors import SafetensorError

from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint, task
from async_rl.errors import ModelError

log = structlog.get_logger(__name__)

RECORD_SUFFIX = ".made.json"
"""Ends the name of the record next to each thing that was made: its recipe, and the size of each file."""


def prepare(config: RunConfig) -> None:
    """Make model.path, data.train and data.eval unless they are there. A second call returns at once.

    Lists of files are the user's own, and left alone.

    Raises ModelError when the package's checkpoint is missing or damaged. Nothing is left half-done then.
    """
    recipe = _recipe()
    targets = (config.data.train, config.data.eval)
    files = [path for path in targets if isinstance(path, Path)]
    if all(_is_current(path, recipe) for path in (*files, config.model.path)):
        return
    with _one_at_a_time(config.model.path):
        for path, rows in zip(targets, task.train_and_eval(), strict=True):
            if isinstance(path, Path) and not _is_current(path, recipe):
                _make_rows(path, list(rows), recipe)
        if not _is_current(config.model.path, recipe):
            _make_model(config.model.path, recipe)


def _make_rows(path: Path, rows: list[task.Problem], recipe: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = _building(path)
    task.write_jsonl(building, rows)
    _put_in_place(building, path, recipe)
    log.info("demo_dataset_written", path=str(path), rows=len(rows))


def _make_model(path: Path, recipe: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = _building(path)
    building.mkdir()
    try:
        checkpoint.unpack(building)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building)
        raise ModelError(
            f"the demo's checkpoint cannot be read from the package: {error}; install the package again, or make the "
            "checkpoint with python -m async_rl.demo.warmup"
        ) from error
    _put_in_place(building, path, recipe)
    log.info("demo_model_written", path=str(path))


def _recipe() -> str:
    """Return a hash of what decides the model and the datasets: this room's code and the checkpoint."""
    digest = blake2b(digest_size=16)
    for source in sorted([*Path(__file__).parent.glob("*.py"), *checkpoint.FOLDER.glob("*")]):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + RECORD_SUFFIX)


def _sizes(path: Path) -> dict[str, int]:
    """Map file names to sizes, for a file or a folder of files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.stat().st_size for file in files}


def _is_current(path: Path, recipe: str) -> bool:
    """Return whether ``path`` can stay: it is complete and of this recipe, or it is the user's own."""
    if not path.exists():
        return False
    try:
        record = json.loads(_record_of(path).read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return bool(record == {"recipe": recipe, "files": _sizes(path)})


def _building(path: Path) -> Path:
    """Return the sibling that ``path`` is built as, without what an interrupted build left there. The lock is held."""
    building = path.with_name(path.name + ".building")
    _remove(building)
    return building


def _put_in_place(building: Path, path: Path, recipe: str) -> None:
    """Write the record, then rename: a crash in between leaves a record without its thing, which is then made again."""
    sizes = _sizes(building) if building.is_dir() else {path.name: building.stat().st_size}
    _remove(path)
    _record_of(path).write_text(json.dumps({"recipe": recipe, "files": sizes}))
    building.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock next to ``path``, so that of two runs that start together the second finds everything made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
