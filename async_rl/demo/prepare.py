"""``prepare``: makes the demo's model and dataset where they are missing. A config names it in its ``prepare`` key.

Owns when something is made anew: where it is missing, incomplete, or made by another recipe than today's. What carries
no record of this module is somebody's own and is left alone. Everything is built beside its place and then renamed, so
that nobody ever sees half of it. Knows the other modules of ``tiny``, ``config`` and ``errors``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import structlog

from async_rl.config.schema import RunConfig
from async_rl.demo import task
from async_rl.errors import ModelError

log = structlog.get_logger(__name__)

# What a made folder or file records: the recipe, and the size of each file.
RECORD_SUFFIX = ".made.json"

# Builds the model in the folder that is its last argument.
WARMUP_COMMAND = (sys.executable, "-m", "async_rl.demo.warmup")


def prepare(config: RunConfig) -> None:
    """Make model.path, data.train and data.eval unless they are there. A second call returns at once.

    Raises ModelError when the warm-up fails; nothing is left half-done then.
    """
    recipe = _recipe()
    targets = [path for path in (config.data.train, config.data.eval) if path is not None]
    if all(_is_current(path, recipe) for path in (*targets, config.model.path)):
        return
    with _one_at_a_time(config.model.path):
        for path, rows in zip(targets, task.train_and_eval(), strict=False):
            if not _is_current(path, recipe):
                _make_rows(path, list(rows), recipe)
        if not _is_current(config.model.path, recipe):
            _make_model(config, recipe)


def _make_rows(path: Path, rows: list[task.Problem], recipe: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = _building(path)
    task.write_jsonl(building, rows)
    _put_in_place(building, path, recipe)
    log.info("dataset written", path=str(path), rows=len(rows))


def _make_model(config: RunConfig, recipe: str) -> None:
    """Build and warm up in a process of its own: Megatron's state is global, and the run's processes start clean."""
    path = config.model.path
    path.parent.mkdir(parents=True, exist_ok=True)
    building = _building(path)
    building.mkdir()
    start = time.monotonic()
    log.info("making the demo's model; a minute or two, once", path=str(path))
    # Nothing is ever written to the pipe. It ends when this process does, however that happens, and the child with it.
    # A session of its own keeps the terminal's Ctrl-C from it; this process hears it and stops the child.
    command = [*WARMUP_COMMAND, str(building)]
    # Threads that spin while they wait for each other take the cores from whatever else this machine does.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment) as child:
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            shutil.rmtree(building)
            raise
    if code != 0:
        shutil.rmtree(building)
        raise ModelError(f"the warm-up of the demo's model ended with exit code {code}; what it said stands above")
    _put_in_place(building, path, recipe)
    log.info("model ready", path=str(path), seconds=round(time.monotonic() - start, 1))


def _recipe() -> str:
    """Hash of what makes model and data: the sources of this package, which hold every constant and seed."""
    digest = blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + RECORD_SUFFIX)


def _sizes(path: Path) -> dict[str, int]:
    """File name to size, for a file or a folder of files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.stat().st_size for file in files}


def _is_current(path: Path, recipe: str) -> bool:
    """True if nothing needs making: it is there, whole and of this recipe, or is there and not ours."""
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
    """The sibling that ``path`` is built as. What an interrupted build left there is removed; the lock is held."""
    building = path.with_name(path.name + ".building")
    _remove(building)
    return building


def _put_in_place(building: Path, path: Path, recipe: str) -> None:
    """The record goes first: a crash in between leaves a record without its thing, which is then made anew."""
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
    """Two runs that start together build once: the second waits here and then finds everything made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
