"""The files of a dataset: their rows by number, read from the disk when they are asked for.

Owns where a row is. In memory is one offset for each line of a JSONL file, and no row. It knows ``errors`` and, for
Parquet and Arrow, ``tables`` and ``arrow_files``; neither prompts nor tokens.
"""

from __future__ import annotations

import glob
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from async_rl.data.arrow_files import ArrowFile, looks_like_arrow, saved_files
from async_rl.data.tables import TableFile, looks_like_parquet
from async_rl.errors import DatasetError, RowFault

_CHUNK = 4 * 2**20


class RowFile(Protocol):
    """One file of a dataset. It can be pickled, and opens its file again where it arrives."""

    path: Path
    count: int
    """Number of rows, usable or not."""
    digest: str
    """Hash of the file's bytes."""
    unit: str
    """What a row is called in messages: line or row."""
    columns: tuple[str, ...] | None
    """The names that every row has; None where each row has its own."""

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the row at ``index``, from 0.

        Raises RowFault for one that cannot be read as an object, DatasetError for a file that is damaged or changed.
        """

    def column(self, name: str) -> Iterator[Any]:
        """Yield the value of every row under this name, None where it has none. Raises DatasetError as ``row``."""


class JsonlFile:
    """A file with one JSON object per line; lines end in \\n, \\r\\n or \\r."""

    unit = "line"
    columns: tuple[str, ...] | None = None

    def __init__(self, path: Path) -> None:
        """Look for the ends of the lines. Raises DatasetError when the file cannot be read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self._bounds, self.digest = _line_bounds(file)
        except OSError as error:
            raise DatasetError(f"dataset {path}: {error.strerror}") from None
        self.count = len(self._bounds) - 1
        self._file: int | None = None

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the JSON object of the line at ``index``; see ``RowFile.row``."""
        raw = self._read(index)
        if not raw.strip():
            raise RowFault("the line is empty")
        try:
            # The first line of a file may start with a byte-order mark, which is not part of the JSON.
            value = json.loads(raw.decode("utf-8-sig" if index == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise RowFault(f"not UTF-8 (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise RowFault(f"not JSON ({error})") from None
        if not isinstance(value, dict):
            raise RowFault(f"expected a JSON object, got {type(value).__name__}")
        return value

    def column(self, name: str) -> Iterator[Any]:
        """Yield the value of every row; see ``RowFile.column``."""
        for index in range(self.count):
            try:
                yield self.row(index).get(name)
            except RowFault:
                yield None

    def _read(self, index: int) -> bytes:
        """Return the bytes of a line without its end."""
        start, stop = int(self._bounds[index]), int(self._bounds[index + 1])
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            raw = os.pread(self._file, stop - start, start)
            if (stamp := _stamp(self._file)) != self._stamp:
                self._check_unchanged()
                self._stamp = stamp
        except OSError as error:
            raise DatasetError(f"dataset {self.path}: {error.strerror}") from None
        return raw.rstrip(b"\r\n")

    def _check_unchanged(self) -> None:
        """Raise DatasetError unless the file, which was touched, still has its old contents."""
        with self.path.open("rb") as file:
            if _line_bounds(file)[1] != self.digest:
                raise DatasetError(f"{self.path} has changed since the run began to read it; put the old file back")

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]  # just compared
            self._file = None


class Files:
    """The rows of several files, one after the other, numbered from 1."""

    def __init__(self, files: Sequence[RowFile], limit: int | None = None) -> None:
        """Take the rows of ``files``, the first ``limit`` of them alone if it is given."""
        self._files = tuple(files)
        self._ends = list(accumulate(file.count for file in files))
        self.count = self._ends[-1]
        self.digest = (
            files[0].digest
            if len(files) == 1
            else blake2b(" ".join(file.digest for file in files).encode(), digest_size=16).hexdigest()
        )
        if limit is not None and limit < self.count:
            self.count = limit
            self.digest = blake2b(f"{self.digest} {limit}".encode(), digest_size=16).hexdigest()

    @property
    def name(self) -> str:
        """What messages call the dataset: the path of its file, or of the first and the number of all."""
        first = str(self._files[0].path)
        return first if len(self._files) == 1 else f"{first} and {len(self._files) - 1} more"

    @property
    def columns(self) -> Sequence[tuple[Path, tuple[str, ...]]]:
        """The files of which every row has the same columns, and these."""
        return [(file.path, file.columns) for file in self._files if file.columns is not None]

    def row(self, number: int) -> Mapping[str, Any]:
        """Return the row ``number``. Raises RowFault and DatasetError as ``RowFile.row`` does."""
        file, index = self._find(number)
        return file.row(index)

    def column(self, name: str) -> Iterator[Any]:
        """Yield the value of every row under this name, None where it has none. Raises DatasetError as ``row``."""
        return islice(chain.from_iterable(file.column(name) for file in self._files), self.count)

    def place(self, number: int) -> str:
        """Return where a row is, for a message that names the dataset: "line 3", with the file if there are several."""
        file, index = self._find(number)
        place = f"{file.unit} {index + 1}"
        return place if len(self._files) == 1 else f"{file.path}, {place}"

    def full_place(self, number: int) -> str:
        """Return where a row is, for a message of its own: "data.jsonl, line 3"."""
        file, index = self._find(number)
        return f"{file.path}, {file.unit} {index + 1}"

    def _find(self, number: int) -> tuple[RowFile, int]:
        at = bisect_right(self._ends, number - 1)
        return self._files[at], number - 1 - (self._ends[at] - self._files[at].count)


def open_files(
    paths: Path | Sequence[Path], *, key: str, cache: Path, in_memory: int, limit: int | None = None
) -> Files:
    """Open what the setting ``key`` names: files, or patterns such as data/*.parquet.

    A Parquet file of more than ``in_memory`` rows is unpacked into the folder ``cache``, see ``tables``. With ``limit``
    the dataset has its first rows alone. Raises DatasetError when there is none, or one cannot be read.
    """
    found = expanded([paths] if isinstance(paths, Path) else paths, key)
    return Files([_open(path, cache, in_memory) for path in found], limit)


def _open(path: Path, cache: Path, in_memory: int) -> RowFile:
    if path.is_dir():
        raise DatasetError(f"dataset {path} is a folder; name its files, for example {path}/*.parquet")
    if looks_like_parquet(path):
        return TableFile(path, cache, in_memory)
    return ArrowFile(path, cache) if looks_like_arrow(path) else JsonlFile(path)


def expanded(paths: Sequence[Path], key: str) -> list[Path]:
    """Return the files that ``key`` means: those of a pattern by name, those of a folder of ``datasets`` in its order.

    Raises DatasetError for none, and for one that is named twice.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            saved = saved_files(path) if path.is_dir() else None
            found += [path] if saved is None else saved
            continue
        matching = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not matching:
            raise DatasetError(f"{key}: no file matches {path}")
        found += matching
    if not found:
        raise DatasetError(f"{key} is an empty list; name at least one file")
    if twice := next((path for at, path in enumerate(found) if path in found[:at]), None):
        raise DatasetError(f"{key} names {twice} twice, so that its rows would be trained twice; remove one of them")
    return found


def _line_bounds(file: Any) -> tuple[npt.NDArray[np.int64], str]:
    """Return where lines begin and the last one ends, int64[lines + 1], and the hash of all bytes."""
    digest = blake2b(digest_size=16)
    bounds = [np.zeros(1, np.int64)]
    size, after_return = 0, False
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        data = np.frombuffer(chunk, np.uint8)
        newline, carriage = data == ord("\n"), data == ord("\r")
        ends = newline | carriage
        ends[:-1] &= ~(carriage[:-1] & newline[1:])  # "\r\n" is one end
        if after_return and newline[0]:
            bounds[-1] = bounds[-1][:-1]
        bounds.append(np.flatnonzero(ends) + (size + 1))
        size, after_return = size + len(chunk), bool(carriage[-1])
    found = np.concatenate(bounds)
    return (found if found[-1] == size else np.append(found, size)), digest.hexdigest()


def _stamp(file: int) -> tuple[int, int]:
    """Return what changes with the contents of an open file: its size, and when it was written, in ns."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns
