"""Reads what was added to the logs and timelines of a folder since the last time: byte ranges, whole lines.

One *stream* is a file that grows, with the older files into which its writer has rolled it:

    logs/rollout-0.jsonl   logs/rollout-0.1.jsonl   logs/rollout-0.2.jsonl     newest to oldest

The reader has no memory. Its caller gives the position up to which it has a stream, and gets the next one with the
bytes between. So it costs nothing if a reader is killed or an answer is lost: what the caller does not have is read
again. A position names a file by its inode, which a file keeps when it is rolled, and by its first bytes, because
inodes are used again, on a host that was restarted for example. ``arrivals`` is the other end.

Knows neither Ray nor what the lines mean.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from async_rl.runtime.runfolder import TARGETS, TIMELINE

FOLDERS = ("logs", TIMELINE)
"""Folders of a run folder whose files grow."""

# Enough for the time in the first line.
_HEAD_BYTES = 256

# name.3.suffix is what was in name.suffix before the last three times that it was rolled.
_OLDER = re.compile(r"(?P<stem>.+)\.(?P<number>\d+)(?P<suffix>\.[^.]+)")


class Position(NamedTuple):
    """A place in a stream."""

    inode: int
    """The number by which the file system knows the file."""
    offset: int
    """Bytes of the file before it."""
    head_bytes: int
    """How many of the first bytes were compared."""
    head: int
    """Their checksum."""


class Piece(NamedTuple):
    """Some bytes of a stream, mostly whole lines."""

    stream: str
    """Path of its latest file, relative to the folder."""
    data: bytes
    position: Position
    """The position after them."""
    gap: bool
    """Whether bytes before them are missing: their file was removed or cut off before it was read."""


class Shipment(NamedTuple):
    """What a folder has beyond certain positions."""

    pieces: list[Piece]
    more: bool
    """Whether there is more than what was asked for at most."""
    targets: dict[str, bytes]
    """All target files for Prometheus, by name."""


def read(folder: Path, positions: Mapping[str, Position], *, most: int, ended: bool = False) -> Shipment:
    """Return what was added to the streams of a run folder, or of a spool, after ``positions``; ``most`` bytes of it.

    ended: whether nothing is written any more, so that a line without an end is one that will not get it.
    """
    pieces: list[Piece] = []
    more = False
    for stream, paths in sorted(_streams(folder).items()):
        left = most - sum(len(piece.data) for piece in pieces)
        added, more = _added(stream, paths, positions.get(stream), left, ended=ended)
        pieces += added
        if more:
            break
    return Shipment(pieces, more, _targets(folder))


def _streams(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each stream, newest first."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for name in FOLDERS:
        with contextlib.suppress(FileNotFoundError):
            for path in (folder / name).iterdir():
                older = _OLDER.fullmatch(path.name)
                latest = path.name if older is None else f"{older['stem']}{older['suffix']}"
                number = 0 if older is None else int(older["number"])
                found.setdefault(f"{name}/{latest}", []).append((number, path))
    return {stream: [path for _, path in sorted(numbered)] for stream, numbered in found.items()}


def _added(
    stream: str, newest_first: list[Path], known: Position | None, most: int, *, ended: bool
) -> tuple[list[Piece], bool]:
    """Return what one stream has after ``known``, the oldest first, and whether it has more than ``most`` bytes."""
    pieces: list[Piece] = []
    with contextlib.ExitStack() as opened:
        files = list(reversed(_open(newest_first, opened).items()))
        start, offset, gap = _start(files, known)
        for inode, file in files[start:]:
            size = os.fstat(file.fileno()).st_size
            if offset > size:
                offset, gap = 0, True
            file.seek(offset)
            raw = file.read(min(most, size - offset))
            cut, last = offset + len(raw) < size, ended or inode != files[-1][0]
            data = raw if last and not cut else _whole_lines(raw, most)
            if data:
                torn = last and not cut and not data.endswith(b"\n")
                after = Position(inode, offset + len(data), *_head(file, min(offset + len(data), _HEAD_BYTES)))
                pieces.append(Piece(stream, data + b"\n" * torn, after, gap))
                gap = False
            if cut:
                return pieces, True
            most -= len(data)
            offset = 0
    return pieces, False


def _open(newest_first: list[Path], opened: contextlib.ExitStack) -> dict[int, BinaryIO]:
    """Open files in that order, so that none is missed that is rolled meanwhile; one that is seen twice counts once."""
    files: dict[int, BinaryIO] = {}
    for path in newest_first:
        with contextlib.suppress(FileNotFoundError):
            file = opened.enter_context(path.open("rb"))
            files.setdefault(os.fstat(file.fileno()).st_ino, file)
    return files


def _start(files: list[tuple[int, BinaryIO]], known: Position | None) -> tuple[int, int, bool]:
    """Return number and offset of the first file to read, and whether what is after ``known`` is gone."""
    if known is None:
        return 0, 0, False
    for number, (inode, file) in enumerate(files):
        shrank = os.fstat(file.fileno()).st_size < known.offset
        if inode == known.inode and (shrank or _head(file, known.head_bytes)[1] == known.head):
            return number, known.offset, False
    return 0, 0, True


def _head(file: BinaryIO, nbytes: int) -> tuple[int, int]:
    """Return ``nbytes``, and the checksum of as many bytes at the beginning of a file."""
    file.seek(0)
    return nbytes, zlib.crc32(file.read(nbytes))


def _whole_lines(raw: bytes, most: int) -> bytes:
    """Return ``raw`` up to its last line end; all of it if one line alone is as long as ``most``, what is asked for."""
    end = raw.rfind(b"\n") + 1
    return raw if not end and len(raw) == most else raw[:end]


def _targets(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in (folder / TARGETS).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.read_bytes()
    return found
