"""The journal of the queue's decisions, on disk: a queue that died is rebuilt from the calls in it.

    frame: u32 length, u32 checksum (xxh32), then msgpack
    [call id, method, arguments]       a call that the broker answered, with the id that its caller gave it
    ["", "restore", [state, answers]]  in place of everything before it; written by ``compact``

The driver begins a journal, with the state that the queue starts with as its first event. So a queue process that finds
no journal, or an empty one, knows that decisions were lost, and does not begin the run again.

A call is written after the broker decided it and before its caller gets the answer. So every answer that a caller has
is on record, and a frame that was torn by the end of the process belongs to a call without an answer. A frame that the
disk has no room for is cut off again, and the call fails. Frames reach the kernel, not the disk: the journal
survives its process but not the machine, for which there are checkpoints.

Knows only files.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgpack
import xxhash

from async_rl.errors import QueueError

_FRAME = struct.Struct("<II")
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
Event = list[Any]
"""[call id, method, arguments]"""


class Journal(Protocol):
    """A place where events are kept in order."""

    def replay(self) -> Iterator[Event]:
        """Yield the event of the last ``compact`` and every event since. Call it before ``append``."""
        ...

    def append(self, event: Event) -> None:
        """Add an event at the end."""
        ...

    def compact(self, event: Event) -> None:
        """Replace all events by one, atomically."""
        ...

    def size(self) -> int:
        """Return the journal's size in bytes."""
        ...

    def close(self) -> None:
        """Release the file or connection."""
        ...


class FileJournal:
    """A journal in one file, with a single writer at a time."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open a journal. Raises QueueError where there is none, unless ``create``."""
        self._path = path
        try:
            self._file = os.open(path, _FLAGS | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            raise QueueError(
                f"{path}: the queue's journal is missing, so the queue cannot be rebuilt; the file was deleted, or is "
                "on the disk of another host; continue the run from its last checkpoint with --resume auto"
            ) from None
        self._bytes = os.fstat(self._file).st_size

    def __str__(self) -> str:
        return str(self._path)

    def replay(self) -> Iterator[Event]:
        """Yield all events, and cut off a torn frame at the end. Raises QueueError for a frame damaged before it."""
        data = self._path.read_bytes()
        position = 0
        while position < len(data):
            if position + _FRAME.size > len(data):
                break
            length, checksum = _FRAME.unpack_from(data, position)
            start = position + _FRAME.size
            frame = data[start : start + length]
            if len(frame) < length:
                break
            if xxhash.xxh32_intdigest(frame) != checksum:
                if start + length == len(data):
                    break
                raise QueueError(f"{self._path} is damaged at byte {position}: the queue cannot be rebuilt from it")
            yield unpack(frame)
            position = start + length
        os.ftruncate(self._file, position)
        self._bytes = position

    def append(self, event: Event) -> None:
        """Add an event at the end. Raises QueueError when it cannot be written; the journal is then as it was."""
        try:
            self._bytes += _write(self._file, self._path, _framed(event))
        except QueueError:
            os.ftruncate(self._file, self._bytes)
            raise

    def compact(self, event: Event) -> None:
        """Replace all events by one. Raises QueueError when it cannot be written; the journal is then as it was."""
        aside = self._path.with_name(self._path.name + ".tmp")
        file = os.open(aside, _FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            written = _write(file, aside, _framed(event))
            os.replace(aside, self._path)
        except BaseException:
            os.close(file)
            aside.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file, self._bytes = file, written

    def size(self) -> int:
        return self._bytes

    def close(self) -> None:
        os.close(self._file)


def pack(event: Event) -> bytes:
    """Return the event in msgpack."""
    packed: bytes = msgpack.packb(event)
    return packed


def unpack(packed: bytes) -> Event:
    """Return the event that ``pack`` packed."""
    event: Event = msgpack.unpackb(packed, strict_map_key=False)
    return event


def _framed(event: Event) -> bytes:
    packed = pack(event)
    return _FRAME.pack(len(packed), xxhash.xxh32_intdigest(packed)) + packed


def _write(file: int, path: Path, frame: bytes) -> int:
    """Write the whole frame at the end of the file; return its size. Raises QueueError when only a part fits."""
    rest = memoryview(frame)
    try:
        while rest:  # a full disk takes a part of a frame first, and refuses the rest with the next call
            rest = rest[os.write(file, rest) :]
    except OSError as error:
        raise QueueError(
            f"{path}: {error.strerror} after {len(frame) - len(rest)} of the {len(frame)} bytes of a decision; its "
            f"disk has {shutil.disk_usage(path.parent).free} bytes free; make room there, then continue the run with "
            "--resume auto"
        ) from None
    return len(frame)
