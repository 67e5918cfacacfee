"""Checkpoint folders on disk: written whole or not at all, checked before they are read, the last few kept.

    checkpoints/step-000020/        what ``save`` of Megatron's distributed checkpointing writes, from every rank
        manifest.json               size and checksum of every file; written last, so that a torn folder has none
        config.yaml                 the run's settings, from which ``async-rl export`` builds the model
    checkpoints/step-000040.partial a checkpoint that is being written, or was not finished

A folder is renamed to its final name when it is complete. Knows files, but not what is in them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import structlog
import xxhash

from async_rl.errors import CheckpointError

log = structlog.get_logger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial"
_BLOCK = 2**22


def name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Return the training step after which a checkpoint was taken."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder; their names look like {name(20)}")
    return int(match[1])


def unfinished(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step`` while it is being written."""
    return folder / (name(step) + _PARTIAL)


def begin(folder: Path, step: int) -> Path:
    """Create the folder that the checkpoint of ``step`` is written into."""
    partial = unfinished(folder, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, *, keep: int) -> Path:
    """Give a complete checkpoint its final name, and remove all but the newest ``keep``. Returns its final path."""
    files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    entries = {key: {"bytes": path.stat().st_size, "xxh3": _checksum(path)} for key, path in files.items()}
    for path in files.values():
        _sync(path)
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    _sync(manifest)
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(final.parent)
    for old in list(_newest_first(final.parent))[keep:]:
        shutil.rmtree(old)
    return final


def oldest_step(folder: Path) -> int:
    """Return the step of the oldest checkpoint in ``folder``; 0 if there is none."""
    return min((step_of(path) for path in _newest_first(folder)), default=0)


def find_damage(path: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is intact."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for key, entry in entries.items():
        file = path / key
        if not file.is_file():
            return f"{key} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{key} has {file.stat().st_size} bytes, {entry['bytes']} were written"
        if _checksum(file) != entry["xxh3"]:
            return f"{key} has another checksum than when it was written"
    return None


def latest_valid(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; None if there is no checkpoint at all.

    Logs each newer one that is damaged. Raises CheckpointError if all checkpoints are damaged.
    """
    faults = []
    for path in _newest_first(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        faults.append(f"{path.name}: {damage}")
        log.warning("checkpoint_damaged", checkpoint=str(path), damage=damage)  # an earlier one is tried
    if faults:
        raise CheckpointError(f"{folder}: all checkpoints are damaged: {'; '.join(faults)}")
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    yield from sorted(found, key=step_of, reverse=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the kernel write a file or folder to disk: a rename must not get there before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
