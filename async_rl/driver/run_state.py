"""The driver's part of a checkpoint as files: where the run stands, and all its work that is not trained yet.

    checkpoints/step-000020/pipeline/state.msgpack    step, policy version, the broker's state, the recorder's sums
    checkpoints/step-000020/pipeline/queued/          finished groups, in wire format
    checkpoints/step-000020/pipeline/in_flight/       unfinished groups, as ``rollout.moments`` writes them

The broker's state says which groups there are. A group that it has as in flight, but of which nothing was saved, is
issued again. So every prompt that was issued is trained, queued, in flight, failed, or in circulation: none is skipped,
none is trained twice.

Knows files and msgpack only. ``driver.checkpoint`` takes and restores the state, ``driver.checkpoint_folder`` looks
after the folder. Format 1, of release 0.1, has a list of the ids of groups in flight, whose files are numbered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.runtime import manifest
from async_rl.runtime.manifest import Entries, write_file

FORMAT_VERSION = 2
_READABLE = (1, 2)
FOLDER = "pipeline"
IN_FLIGHT = f"{FOLDER}/in_flight"
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
    queued: Mapping[str, Any]
    """Finished groups: encoded messages by group id. Before they are written, references to them or addresses."""
    in_flight: Mapping[str, Path]
    """Unfinished groups: files by group id."""
    canary: Mapping[str, Any] | None = None
    """The canary's calibration: the fields of ``weights.canary.Noise``. None in checkpoints of earlier versions."""


def write_queued(folder: Path, messages: Iterable[Any]) -> Entries:
    """Write finished groups, in the order of ``RunState.queued``, into the folder of a checkpoint."""
    (folder / FOLDER / "queued").mkdir(parents=True)
    names = (f"{FOLDER}/queued/{number:06}" for number in itertools.count())
    return {name: write_file(folder / name, memoryview(message)) for name, message in zip(names, messages)}  # noqa: B905


def write_head(folder: Path, state: RunState) -> Entries:
    """Write all of ``state`` but its messages into the folder of a checkpoint."""
    head = {
        "format": FORMAT_VERSION,
        "step": state.step,
        "version": state.version,
        "pushed": state.synced,
        "queue": state.queue,
        "recorder": state.recorder,
        "queued": [group_id for group_id, payload in state.queued.items() if not isinstance(payload, str)],
        "in_flight": {group_id: path.name for group_id, path in state.in_flight.items()},
        "canary": state.canary,
    }
    return {_HEAD: write_file(folder / _HEAD, msgpack.packb(head))}


def read(folder: Path) -> RunState:
    """Read the state in the folder of a checkpoint, with the messages of its queued groups.

    Raises CheckpointError if it has none, or another format, and CheckpointDamaged.
    """
    return _read(folder, _messages)


def read_head(folder: Path) -> RunState:
    """Read a state without its messages, which can be large: ``queued`` is empty. Raises what ``read`` raises."""
    return _read(folder, lambda *_: {})


def _read(folder: Path, messages: Callable[[Path, Sequence[str]], dict[str, bytes]]) -> RunState:
    top = folder / FOLDER
    try:
        content = (folder / _HEAD).read_bytes()
        _check(folder, content)
        head = msgpack.unpackb(content, strict_map_key=False)
        if head["format"] not in _READABLE:
            raise CheckpointError(f"{top} has format {head['format']}; this version reads format {FORMAT_VERSION}")
        files = head["in_flight"]
        if head["format"] == 1:
            files = {group_id: f"{number:06}" for number, group_id in enumerate(files)}
        return RunState(
            step=head["step"],
            version=head["version"],
            synced=head["pushed"],
            queue=head["queue"],
            recorder=head["recorder"],
            queued=messages(top / "queued", head["queued"]),
            in_flight={group_id: folder / IN_FLIGHT / name for group_id, name in files.items()},
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


def _messages(folder: Path, group_ids: Sequence[str]) -> dict[str, bytes]:
    return {group_id: (folder / f"{number:06}").read_bytes() for number, group_id in enumerate(group_ids)}
