"""Files of JSON lines that grow with a run's steps: rolled by size, read from the end, cut in place at a step.

    samples.jsonl              the latest lines
    samples-000007.jsonl       lines before them; the numbers rise, and only the newest parts are kept
    trained-000007.jsonl.gz    the same of a file of which nothing may be lost: compressed, and all parts are kept

Knows nothing of what the lines mean but their ``step``, which does not fall within a file.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

_BLOCK = 64 * 2**10
_COMPRESSED = ".gz"
# A lone surrogate, which a dataset may contain, cannot be encoded as UTF-8; JSON has an escape for it.
ERRORS = "backslashreplace"


def parts(path: Path) -> list[Path]:
    """Return the files that hold the lines of ``path``, oldest first and ``path`` last, as far as they exist."""
    return [*dict(sorted(_rolled(path))).values(), *([path] if path.exists() else [])]


def open_part(path: Path) -> IO[bytes]:
    """Open one of the ``parts`` for reading; a compressed one, whose size is bounded, is read into memory."""
    return io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == _COMPRESSED else path.open("rb")


class RollingLines:
    """One file and its older parts. Only one thread at a time may use it."""

    def __init__(self, path: Path, *, max_bytes: int | None = None, keep: int | None = None) -> None:
        """Open nothing yet.

        max_bytes: size at which a part is full; None for one file of any size. keep: number of older parts; None keeps
        all, compressed.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._stream: BinaryIO | None = None
        self._compressing: threading.Thread | None = None

    def append(self, line: str) -> None:
        """Write one line, given without its end, so that it is on disk if this process is killed afterwards.

        Raises OSError, with the name of the file, when there is no room for it; the file is then as it was.
        """
        if self._stream is None:
            self._stream = self._path.open("ab")
        before = self._stream.tell()
        try:
            self._stream.write(line.encode(errors=ERRORS) + b"\n")
            self._stream.flush()
        except OSError as error:
            self._give_up_line(before)
            error.filename = str(self._path)
            raise
        self._roll_if_full()

    def move_after(self, step: int, aside: RollingLines) -> None:
        """Move the lines of steps after ``step``, and one that was cut off when its writer was killed, to ``aside``.

        Takes time and memory for the lines that are moved, and for one part at most, however long the file is.
        """
        self.close()
        for _, part in _rolled(self._path):
            if part.with_name(part.name + _COMPRESSED).exists():
                part.unlink()  # its compression was ended by a kill just before this
        gone: list[tuple[Path, int]] = []
        for part in reversed(parts(self._path)):
            size, offset = _where(part, step)
            if offset < size:
                gone.insert(0, (part, offset))
            if offset:
                break
        for part, offset in gone:
            with open_part(part) as stream:
                stream.seek(offset)
                aside._take(stream)
        for part, offset in reversed(gone):
            if offset == 0:
                part.unlink()
            else:
                self._cut(part, offset)

    def close(self) -> None:
        """Close the file, which ``append`` opens again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._compressing is not None:
            self._compressing.join()
            self._compressing = None

    def _give_up_line(self, before: int) -> None:
        """Cut off what was written of a line, and close the stream, which would write the rest later."""
        stream, self._stream = self._stream, None
        with suppress(OSError):
            if stream is not None:
                stream.close()
        with suppress(OSError):
            os.truncate(self._path, before)

    def _take(self, lines: IO[bytes]) -> None:
        with self._path.open("ab") as self._stream:
            shutil.copyfileobj(lines, self._stream, _BLOCK)
            self._stream.flush()
            self._roll_if_full()
        self.close()

    def _cut(self, part: Path, offset: int) -> None:
        """Make ``part`` the latest one, with its first ``offset`` bytes."""
        if part.suffix == _COMPRESSED:
            temporary = self._path.with_name(self._path.name + ".tmp")
            with open_part(part) as lines:
                temporary.write_bytes(lines.read(offset))
            os.replace(temporary, self._path)
            part.unlink()
        else:
            os.replace(part, self._path)  # the same file, mostly
            os.truncate(self._path, offset)

    def _roll_if_full(self) -> None:
        assert self._stream is not None
        if self._max_bytes is None or self._stream.tell() < self._max_bytes:
            return
        self.close()
        rolled = sorted(_rolled(self._path))
        number = rolled[-1][0] + 1 if rolled else 1
        os.replace(self._path, self._path.with_name(f"{self._path.stem}-{number:06d}{self._path.suffix}"))
        if self._keep is None:
            # In a thread: a part takes longer than the driver's event loop may be blocked.
            self._compressing = threading.Thread(target=_compress_all, args=(self._path,))
            self._compressing.start()
        else:
            for _, part in rolled[: max(0, len(rolled) + 1 - self._keep)]:
                part.unlink()


def _rolled(path: Path) -> list[tuple[int, Path]]:
    """Return (number, file) of the older parts in any order; a part twice if a kill left it also uncompressed."""
    name = re.compile(rf"{re.escape(path.stem)}-(\d{{6,}}){re.escape(path.suffix)}({re.escape(_COMPRESSED)})?")
    return [(int(match[1]), other) for other in path.parent.iterdir() if (match := name.fullmatch(other.name))]


def _compress_all(path: Path) -> None:
    """Compress each older part that is not, also one that an earlier process left, or for which there was no room."""
    for _, part in _rolled(path):
        if part.suffix == _COMPRESSED:
            continue
        temporary = part.with_name(part.name + ".tmp")
        try:
            with part.open("rb") as old, gzip.open(temporary, "wb") as new:
                shutil.copyfileobj(old, new, _BLOCK)
            os.replace(temporary, part.with_name(part.name + _COMPRESSED))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            return
        part.unlink()


def _where(part: Path, step: int) -> tuple[int, int]:
    """Return the size of a part, uncompressed, and the offset at which the lines after ``step`` begin."""
    with open_part(part) as stream:
        size = offset = stream.seek(0, os.SEEK_END)
        for begin, line in _backwards(stream, size):
            if _step(line) <= step:
                break
            offset = begin
    return size, offset


def _backwards(stream: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of each line from the last to the first, reading block by block."""
    position, rest = size, b""
    while position:
        before = max(0, position - _BLOCK)
        stream.seek(before)
        block = stream.read(position - before) + rest
        position, end = before, len(block)
        while (newline := block.rfind(b"\n", 0, end - 1)) >= 0:
            yield position + newline + 1, block[newline + 1 : end]
            end = newline + 1
        rest = block[:end]
    if rest:
        yield 0, rest


def _step(line: bytes) -> float:
    """Return the step of a line; infinity for a line that was cut off when its writer was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
