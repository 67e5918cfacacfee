"""What a checkpoint holds of the pipeline, beside the trainer's state: where the run stands, and all work in flight.

    checkpoints/step-000020/pipeline/state.msgpack    step, policy version, the broker's state, the recorder's sums
    checkpoints/step-000020/pipeline/queued/          finished groups, in wire format
    checkpoints/step-000020/pipeline/in_flight/       unfinished ones, as ``rollout.in_flight`` has them

Taken between two training steps, while engines stand still. The broker's state says which groups there are; a group
that it has as running and of which there is nothing in flight is issued again. So every prompt that was issued is
trained, queued, in flight, failed, or in circulation: none is skipped, none is trained twice.

Knows files and msgpack; ``trainer.checkpoint`` has the folder's integrity.
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
    """step: the last training step. version: the policy version; pushed: whether it is that of the weights of this
    step, which were pushed then. queue: state of the broker. recorder: of the summary. queued, in_flight: messages by
    group id."""

    step: int
    version: int
    pushed: bool
    queue: Mapping[str, Any]
    recorder: Mapping[str, Any]
    queued: Mapping[str, Any]
    in_flight: Mapping[str, Any]


def write(folder: Path, state: RunState) -> None:
    """Into the folder of a checkpoint."""
    top = folder / FOLDER
    for name, messages in (("queued", state.queued), ("in_flight", state.in_flight)):
        (top / name).mkdir(parents=True)
        for number, message in enumerate(messages.values()):
            (top / name / f"{number:06}").write_bytes(memoryview(message))
    head = {
        "format": FORMAT_VERSION,
        "step": state.step,
        "version": state.version,
        "pushed": state.pushed,
        "queue": state.queue,
        "recorder": state.recorder,
        "queued": list(state.queued),
        "in_flight": list(state.in_flight),
    }
    (top / "state.msgpack").write_bytes(msgpack.packb(head))


def read(folder: Path) -> RunState:
    """From the folder of a checkpoint whose files are sound. Raises CheckpointError for one without, or of another
    format."""
    return _read(folder, _messages)


def read_head(folder: Path) -> RunState:
    """As ``read``, without the messages, which can be large: ``queued`` and ``in_flight`` are empty."""
    return _read(folder, lambda folder, group_ids: {})


def _read(folder: Path, messages: Callable[[Path, Sequence[str]], dict[str, bytes]]) -> RunState:
    top = folder / FOLDER
    try:
        head = msgpack.unpackb((top / "state.msgpack").read_bytes(), strict_map_key=False)
        if head["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{top} is of format {head['format']}; this version reads {FORMAT_VERSION}")
        return RunState(
            step=head["step"],
            version=head["version"],
            pushed=head["pushed"],
            queue=head["queue"],
            recorder=head["recorder"],
            queued=messages(top / "queued", head["queued"]),
            in_flight=messages(top / "in_flight", head["in_flight"]),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} holds no state of a pipeline: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{top}/state.msgpack cannot be read: {error!r}") from None


def _messages(folder: Path, group_ids: Sequence[str]) -> dict[str, bytes]:
    return {group_id: (folder / f"{number:06}").read_bytes() for number, group_id in enumerate(group_ids)}
