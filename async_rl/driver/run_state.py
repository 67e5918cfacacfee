"""The driver's part of a checkpoint as files: where the run stands, and all its work that is not trained yet.

    checkpoints/step-000020/pipeline/state.msgpack    step, policy version, the broker's state, the recorder's sums
    checkpoints/step-000020/pipeline/queued/          finished groups, in wire format
    checkpoints/step-000020/pipeline/in_flight/       unfinished groups, as ``rollout.in_flight`` encodes them

The broker's state says which groups there are. A group that it has as in flight, but of which nothing was saved, is
issued again. So every prompt that was issued is trained, queued, in flight, failed, or in circulation: none is skipped,
none is trained twice.

Knows files and msgpack only. ``driver.checkpoint`` takes and restores the state, ``driver.checkpoint_folder`` checks
the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from async_rl.errors import CheckpointError

FORMAT_VERSION = 1
FOLDER = "pipeline"


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
    """Finished groups: encoded messages by group id. Before they are written, references to them."""
    in_flight: Mapping[str, Any]
    """Unfinished groups: encoded messages by group id."""
    canary: Mapping[str, Any] | None = None
    """The canary's calibration: the fields of ``weights.canary.Noise``. None in checkpoints of earlier versions."""


def write(folder: Path, state: RunState) -> None:
    """Write ``state`` into the folder of a checkpoint."""
    top = folder / FOLDER
    for name, messages in (("queued", state.queued), ("in_flight", state.in_flight)):
        (top / name).mkdir(parents=True)
        for number, message in enumerate(messages.values()):
            (top / name / f"{number:06}").write_bytes(memoryview(message))
    head = {
        "format": FORMAT_VERSION,
        "step": state.step,
        "version": state.version,
        "pushed": state.synced,
        "queue": state.queue,
        "recorder": state.recorder,
        "queued": list(state.queued),
        "in_flight": list(state.in_flight),
        "canary": state.canary,
    }
    (top / "state.msgpack").write_bytes(msgpack.packb(head))


def read(folder: Path) -> RunState:
    """Read the state in the folder of a valid checkpoint. Raises CheckpointError if it has none, or another format."""
    return _read(folder, _messages)


def read_head(folder: Path) -> RunState:
    """Read a state without its messages, which can be large: ``queued`` and ``in_flight`` are empty."""
    return _read(folder, _no_messages)


def _read(folder: Path, messages: Callable[[Path, Sequence[str]], dict[str, bytes]]) -> RunState:
    top = folder / FOLDER
    try:
        head = msgpack.unpackb((top / "state.msgpack").read_bytes(), strict_map_key=False)
        if head["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{top} has format {head['format']}; this version reads format {FORMAT_VERSION}")
        return RunState(
            step=head["step"],
            version=head["version"],
            synced=head["pushed"],
            queue=head["queue"],
            recorder=head["recorder"],
            queued=messages(top / "queued", head["queued"]),
            in_flight=messages(top / "in_flight", head["in_flight"]),
            canary=head.get("canary"),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} holds no driver state: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{top}/state.msgpack cannot be read: {error!r}") from None


def _messages(folder: Path, group_ids: Sequence[str]) -> dict[str, bytes]:
    return {group_id: (folder / f"{number:06}").read_bytes() for number, group_id in enumerate(group_ids)}


def _no_messages(_: Path, __: Sequence[str]) -> dict[str, bytes]:
    return {}
