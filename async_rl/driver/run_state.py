"""The driver's part of a checkpoint as files: where the run stands, and all its work that is not trained yet.

    checkpoints/step-000020/pipeline/state.msgpack    step, policy version, the broker's state, the recorder's sums
    checkpoints/step-000020/pipeline/queued/          finished groups, in wire format, see ``driver.queued_groups``
    checkpoints/step-000020/pipeline/in_flight/       unfinished groups, as ``rollout.moments`` writes them

The broker's state says which groups there are. A group of which it knows, but of which nothing was saved, is issued
again. So every prompt that was issued is trained, queued, in flight, failed, filtered, or in circulation: none is
skipped, none is trained twice.

Knows msgpack and the names of files, and writes and reads the head alone. ``driver.checkpoint`` takes and restores the
state, ``driver.checkpoint_folder`` looks after the folder. Earlier formats have lists of ids, of groups whose files are
numbered: format 2 of the finished ones, format 1, of release 0.1, of those in flight too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.runtime import manifest
from async_rl.runtime.manifest import Entries, write_file

FORMAT_VERSION = 3
_READABLE = (1, 2, 3)
FOLDER = "pipeline"
IN_FLIGHT = f"{FOLDER}/in_flight"
QUEUED = f"{FOLDER}/queued"
_HEAD = f"{FOLDER}/state.msgpack"


@dataclass(frozen=True, slots=True)
class RunState:
    """One moment of a run, between two training steps."""

    step: int
    """The last training step."""
    version: int
    """The policy version."""
    synced: bool
    """Whether the weights of ``version`` are those after ``step``; false after a step without a weight sync."""
    queue: Mapping[str, Any]
    """The state of the broker."""
    recorder: Mapping[str, Any]
    """What the run's summary needs of the steps so far."""
    queued: Mapping[str, Path]
    """Finished groups: files by group id. Those that Redis has are not among them."""
    in_flight: Mapping[str, Path]
    """Unfinished groups: files by group id."""
    canary: Mapping[str, Any] | None = None
    """The canary's calibration: the fields of ``weights.canary.Noise``. None in checkpoints of earlier versions."""


def write_head(folder: Path, state: RunState) -> Entries:
    """Write ``state`` into the folder of a checkpoint; the files of its groups are there already."""
    head = {
        "format": FORMAT_VERSION,
        "step": state.step,
        "version": state.version,
        "pushed": state.synced,
        "queue": state.queue,
        "recorder": state.recorder,
        "queued": {group_id: path.name for group_id, path in state.queued.items()},
        "in_flight": {group_id: path.name for group_id, path in state.in_flight.items()},
        "canary": state.canary,
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    return {_HEAD: write_file(folder / _HEAD, msgpack.packb(head))}


def read(folder: Path) -> RunState:
    """Read the state in the folder of a checkpoint.

    Raises CheckpointError if it has none, or another format, and CheckpointDamaged.
    """
    top = folder / FOLDER
    try:
        content = (folder / _HEAD).read_bytes()
        _check(folder, content)
        head = msgpack.unpackb(content, strict_map_key=False)
        if head["format"] not in _READABLE:
            raise CheckpointError(f"{top} has format {head['format']}; this version reads format {FORMAT_VERSION}")
        return RunState(
            step=head["step"],
            version=head["version"],
            synced=head["pushed"],
            queue=head["queue"],
            recorder=head["recorder"],
            queued=_files(folder / QUEUED, head["queued"]),
            in_flight=_files(folder / IN_FLIGHT, head["in_flight"]),
            canary=head.get("canary"),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} holds no driver state: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{top}/state.msgpack cannot be read: {error!r}") from None


def _check(folder: Path, head: bytes) -> None:
    """Raise CheckpointDamaged unless ``head`` is what was written. The trainer's ranks check all other files."""
    entry = manifest.read(folder).get(_HEAD)
    if entry is not None and manifest.checksum_of(head) != entry.xxh3:
        raise CheckpointDamaged(str(folder), f"{_HEAD} has another checksum than when it was written")


def _files(folder: Path, files: Mapping[str, str] | Sequence[str]) -> dict[str, Path]:
    if not isinstance(files, Mapping):
        files = {group_id: f"{number:06}" for number, group_id in enumerate(files)}
    return {group_id: folder / name for group_id, name in files.items()}
