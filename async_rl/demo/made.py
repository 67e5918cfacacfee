"""Makes files and folders once: a demo's model and its datasets.

Owns when something is made again: when it is missing, incomplete, or was made by another recipe. A file or folder
without a record of this module belongs to the user and is left alone. Everything is built next to its place and then
renamed, so that no reader ever sees a half-written one. Knows ``config``.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import structlog

from async_rl.config.schema import RunConfig

log = structlog.get_logger(__name__)

Rows = TypeVar("Rows")

Build = Callable[[Path], None]
"""Writes a file or folder at the path that it is given."""

RECORD_SUFFIX = ".made.json"
"""Ends the name of the record next to each thing that was made: its recipe, and the size of each file."""


def recipe_of(sources: Iterable[Path]) -> str:
    """Return a hash of the files that decide what is made."""
    digest = blake2b(digest_size=16)
    for source in sorted(sources):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def make_inputs(
    config: RunConfig,
    recipe: str,
    *,
    model: Build,
    sets: Callable[[], tuple[Rows, Rows]],
    write: Callable[[Path, Rows], None],
) -> None:
    """Make model.path, data.train and data.eval of a config unless they are there. A second call returns at once.

    ``sets`` returns the rows of both files, and is called only for a file that is made. Lists of files are the user's
    own, and left alone.
    """

    def rows_of(number: int) -> Build:
        return lambda path: write(path, sets()[number])

    files = enumerate((config.data.train, config.data.eval))
    builders = {path: rows_of(number) for number, path in files if isinstance(path, Path)} | {config.model.path: model}
    for path in make_missing(builders, recipe, lock=config.model.path):
        log.info("demo_file_written", path=str(path))


def make_missing(builders: Mapping[Path, Build], recipe: str, *, lock: Path) -> list[Path]:
    """Make each file or folder that is not current, and return those that were made. A second call returns at once.

    Of two processes that start together the second one waits, by a file next to ``lock``, and finds everything made.
    What a builder raises is raised, and leaves nothing behind.
    """
    if all(_is_current(path, recipe) for path in builders):
        return []
    with _one_at_a_time(lock):
        missing = [path for path in builders if not _is_current(path, recipe)]
        for path in missing:
            _make(path, recipe, builders[path])
        return missing


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


def _make(path: Path, recipe: str, build: Build) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(path.name + ".building")
    _remove(building)  # what an interrupted build left
    try:
        build(building)
    except BaseException:
        _remove(building)
        raise
    _put_in_place(building, path, recipe)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + RECORD_SUFFIX)


def _sizes(path: Path) -> dict[str, int]:
    """Map file names to sizes, for a file or a folder of files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.stat().st_size for file in files}


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
