"""The manifest of a folder: size and checksum of every file, taken while the files are written.

    manifest.json   {"files": {"weights/0": {"bytes": 5000, "xxh3": "0f3c..."}, ...}}

Each process makes the entries of the files that it writes, from the bytes that it passes to the disk. So the process
that writes the manifest reads none of them, and a damaged file is found when it is read. Does not know what the files
hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

NAME = "manifest.json"
_BLOCK = 2**22
# Network file systems give one stream a fraction of what they have.
_READERS = 4


class FileEntry(NamedTuple):
    """One file of a manifest."""

    bytes: int
    xxh3: str
    """xxh3_64 of its content, in hexadecimal."""


Entries = dict[str, FileEntry]
"""Entries by path relative to the folder."""


class ChecksummedFile:
    """A new file whose checksum is taken while it is written; on disk once the ``with`` block has ended."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_64()
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, block: Any) -> int:
        """Append a buffer of bytes. Returns its length."""
        written = self._file.write(block)
        self._digest.update(block)
        self._bytes += written
        return written

    def tell(self) -> int:
        """Return the position in the file, which is its end."""
        return self._bytes

    def flush(self) -> None:
        """Pass what is buffered to the operating system."""
        self._file.flush()

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._bytes, self._digest.hexdigest())


def write_file(path: Path, content: Any) -> FileEntry:
    """Write a buffer of bytes to a new file, wait until it is on disk, and return its entry."""
    with ChecksummedFile(path) as file:
        file.write(content)
    return file.entry


def write(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write the manifest of ``folder``, wait until it is on disk."""
    table = {name: entries[name]._asdict() for name in sorted(entries)}
    write_file(folder / NAME, json.dumps({"files": table}, indent=1).encode())


def read(folder: Path) -> Entries:
    """Read the manifest of ``folder``. Raises OSError if there is none, and ValueError if it cannot be understood."""
    try:
        table = json.loads((folder / NAME).read_text())["files"]
        return {name: FileEntry(entry["bytes"], entry["xxh3"]) for name, entry in table.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / NAME}: {error!r}") from None


def find_missing(folder: Path, entries: Mapping[str, FileEntry]) -> str | None:
    """Describe the first file that is missing or has another size than its entry; None if there is none.

    Reads no file.
    """
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{name} has {size} bytes, {entry.bytes} were written"
    return None


def find_altered(folder: Path, entries: Mapping[str, FileEntry]) -> str | None:
    """Describe the first file whose content is not what was written; None if there is none. Reads each file."""

    def altered(name: str) -> str | None:
        try:
            intact = checksum(folder / name) == entries[name].xxh3
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None if intact else f"{name} has another checksum than when it was written"

    if (missing := find_missing(folder, entries)) is not None:
        return missing
    with ThreadPoolExecutor(_READERS, thread_name_prefix="checksum") as readers:
        return next(filter(None, readers.map(altered, entries)), None)


def checksum(path: Path) -> str:
    """Read a file and return the checksum of its content."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksum_of(content: bytes) -> str:
    """Return the checksum of a file's content that was read already."""
    return xxhash.xxh3_64_hexdigest(content)


def sync_folders(folders: Iterable[Path]) -> None:
    """Have the kernel write these folders to disk: a rename must not get there before the files in them."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def entries_of(folder: Path, names: Iterable[str]) -> Entries:
    """Return the entries of small files that another library wrote, by reading them; they are on disk then."""
    found = {}
    for name in names:
        path = folder / name
        found[name] = FileEntry(path.stat().st_size, checksum(path))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return found
