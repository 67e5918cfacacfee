"""Checkpoint folders on disk: written whole or not at all, the last few kept.

    checkpoints/step-000020/        what ``save`` of Megatron's distributed checkpointing writes, from every rank
        manifest.json               size and checksum of every file; written last, so that a torn folder has none
        pipeline/                   the driver's part and the groups in flight, see ``driver.run_state``
        config.yaml                 the run's settings, from which ``async-rl export`` knows its model
    checkpoints/step-000040.partial a checkpoint that is being written, or was not finished
    checkpoints/best-step-000010/   the best of those that are not among the newest, with checkpoint.keep_best; no run
                                    is restored from it

A folder is renamed to its final name when it is complete. Sizes and checksums come from the processes that wrote the
files, and checksums are compared by the trainer's ranks when they load a checkpoint: nothing here reads a file but the
manifest. Knows files, but not what is in them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog

from async_rl.errors import CheckpointError
from async_rl.runtime import manifest
from async_rl.runtime.manifest import FileEntry

log = structlog.get_logger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial"
_BEST = "best-"


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
    """Create the folder that the checkpoint of ``step`` is written into; remove what is left of unfinished ones."""
    for left in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)
    partial = unfinished(folder, step)
    partial.mkdir(parents=True, exist_ok=True)  # a worker may be at the end of writing an earlier attempt
    return partial


def commit(
    partial: Path, entries: Mapping[str, FileEntry], *, keep: int, scores: Mapping[int, float] | None = None
) -> Path:
    """Give a complete checkpoint its final name, and remove all but the newest ``keep``. Returns its final path.

    ``scores``, by step, are those of evaluations: of the removed ones the best is kept under another name.
    ``entries`` are those of all files, which are on disk. Raises CheckpointError unless all are in the folder.
    """
    missing = manifest.find_missing(partial, entries)
    if missing is not None:
        raise CheckpointError(
            f"checkpoint {partial}: {missing}; set `runs` to a folder on a file system that all hosts share, or "
            "cluster.shared_fs to false"
        )
    manifest.write(partial, entries)
    manifest.sync_folders({partial, *((partial / name).parent for name in entries)})
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    manifest.sync_folders([final.parent])
    for old in list(_newest_first(final.parent))[keep:]:
        _retire(old, scores or {})
    return final


def best(folder: Path, scores: Mapping[int, float]) -> Path | None:
    """Return the checkpoint with the highest score, the earliest of several; None if none has one."""
    found = [path for path in (*_bests(folder), *_newest_first(folder)) if _step_of_any(path) in scores]
    return max(found, key=lambda path: (scores[_step_of_any(path)], -_step_of_any(path)), default=None)


def _retire(old: Path, scores: Mapping[int, float]) -> None:
    """Remove a checkpoint that is not among the newest any more, or keep it as the best in place of the one before."""
    final, others = old.with_name(_BEST + old.name), _bests(old.parent)
    score, lowest = scores.get(step_of(old)), float("-inf")
    # One of the same step is of weights that were undone.
    known = [lowest if other == final else scores.get(_step_of_any(other), lowest) for other in others]
    if score is None or any(score <= other for other in known):
        shutil.rmtree(old)
        return
    shutil.rmtree(final, ignore_errors=True)
    old.rename(final)
    for other in others:
        if other != final:
            shutil.rmtree(other)


def _bests(folder: Path) -> list[Path]:
    """Return the checkpoint that is kept as the best; two after a kill between a rename and a removal."""
    found = folder.glob(f"{_BEST}*")
    return sorted(path for path in found if _NAME.fullmatch(path.name.removeprefix(_BEST)))


def _step_of_any(path: Path) -> int:
    return step_of(path.with_name(path.name.removeprefix(_BEST)))


def oldest_step(folder: Path) -> int:
    """Return the step of the oldest checkpoint in ``folder``; 0 if there is none."""
    return min((step_of(path) for path in _newest_first(folder)), default=0)


def find_damage(path: Path) -> str | None:
    """Describe what is missing of a checkpoint; None if all of its files are there in their size."""
    try:
        entries = manifest.read(path)
    except OSError as error:
        return f"{manifest.NAME}: {error.strerror}"
    except ValueError:
        return f"{manifest.NAME} cannot be read"
    return manifest.find_missing(path, entries)


def latest_valid(folder: Path, damaged: Mapping[Path, str] | None = None) -> Path | None:
    """Return the newest checkpoint whose files are all there; None if there is no checkpoint at all.

    ``damaged`` are those that were found damaged when they were loaded. Logs each newer one that is damaged. Raises
    CheckpointError if all checkpoints are damaged.
    """
    known, faults = damaged or {}, []
    for path in _newest_first(folder):
        damage = known.get(path) or find_damage(path)
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
