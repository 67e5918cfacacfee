"""Arrow files as rows, mapped into memory: those of folders that ``datasets`` has saved, and others.

A row is decoded when it is asked for, and nothing else of the file is held in memory. Compressed files, whose rows
cannot be mapped, are unpacked once, as Parquet is. Knows only pyarrow, which is an extra, ``tables`` and ``errors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from async_rl.data.tables import arrow_extra, digest_of, named, row_of, unpack, values_of
from async_rl.errors import DatasetError

_SPLITS = "dataset_dict.json"
_STATE = "state.json"
_KIND = "Arrow"

# How a file of the Arrow file format begins, and one of the streaming format, which ``datasets`` writes, and its end.
_FILE, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_END = _STREAM + bytes(4)


class ArrowFile:
    """One Arrow file; see ``files.RowFile``."""

    unit = "row"

    def __init__(self, path: Path, cache: Path) -> None:
        """Read what the file says of itself; unpack a compressed one into the folder ``cache``.

        Raises DatasetError when it cannot be read, or pyarrow is not installed.
        """
        self.path = path
        arrow_extra(path, _KIND)
        with named(path, _KIND):
            self.digest = digest_of(path)
            self._stamp = _stamp(path)
            reader, mapped = _open(path)
            self.columns: tuple[str, ...] | None = tuple(reader.schema.names)
            first = next(_batches(reader), None)
            self._mapped = path if first is None or _lies_in(mapped, first) else cache / f"{self.digest}.arrow"
        if self._mapped != path and not self._mapped.exists():
            with named(path, _KIND):
                reader, _ = _open(path)
            unpack(path, _KIND, self._mapped, reader.schema, _batches(reader))
        self._table: Any = None
        self.count: int = self._rows().num_rows

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the row at ``index``; see ``RowFile.row``."""
        if self._mapped == self.path:
            self._check_unchanged()
        return row_of(self._rows(), index)

    def column(self, name: str) -> Iterator[Any]:
        """Yield the value of every row; see ``RowFile.column``."""
        return values_of(self._rows(), name)

    def _rows(self) -> Any:
        if self._table is None:
            import pyarrow

            with named(self._mapped, _KIND):
                reader, _ = _open(self._mapped)
                self._table = pyarrow.Table.from_batches(_batches(reader), reader.schema)
        return self._table

    def _check_unchanged(self) -> None:
        """Raise DatasetError unless the file, which is mapped, still has its old contents."""
        with named(self.path, _KIND):
            if (stamp := _stamp(self.path)) == self._stamp:
                return
            if digest_of(self.path) != self.digest:
                raise DatasetError(f"{self.path} has changed since the run began to read it; put the old file back")
            self._stamp = stamp

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None}


def looks_like_arrow(path: Path) -> bool:
    """Return whether a file is meant to be Arrow: by its name, or by its first bytes."""
    if path.suffix == ".arrow":
        return True
    try:
        with path.open("rb") as file:
            begin = file.read(len(_FILE))
    except OSError:
        return False
    return begin == _FILE or begin[: len(_STREAM)] == _STREAM


def saved_files(folder: Path) -> list[Path] | None:
    """Return the Arrow files of a folder that ``save_to_disk`` has written, in order; None for another folder.

    Raises DatasetError for one of several splits, and one that is not complete.
    """
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS).get("splits") or ["train"]
        raise DatasetError(
            f"dataset {folder} has the splits {', '.join(splits)}; name one of them: {folder / splits[0]}"
        )
    if not (folder / _STATE).is_file():
        return None
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DatasetError(
            f"dataset {folder} was saved as a selection of rows by an old release of datasets; save it once more with "
            "a new one: datasets.load_from_disk(...).flatten_indices().save_to_disk(...)"
        )
    entries = [entry for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    names = [name for entry in entries if isinstance(name := entry.get("filename"), str)]
    if not names:
        raise DatasetError(f"dataset {folder}: {_STATE} names no files; save the dataset once more")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"dataset {path.parent}: {path.name} cannot be read ({error})") from None
    return found if isinstance(found, dict) else {}


def _open(path: Path) -> tuple[Any, Any]:
    """Return a reader of a file of either format, and the buffer of all its bytes, which are mapped."""
    import pyarrow

    mapped = pyarrow.memory_map(str(path)).read_buffer()
    is_file = mapped.slice(0, min(len(_FILE), mapped.size)).to_pybytes() == _FILE
    if is_file:
        return pyarrow.ipc.open_file(mapped), mapped
    if mapped.slice(max(0, mapped.size - len(_END))).to_pybytes() != _END:
        raise pyarrow.ArrowInvalid("it does not end as a stream does")  # a cut between two batches shows nowhere else
    return pyarrow.ipc.open_stream(mapped), mapped


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _lies_in(mapped: Any, batch: Any) -> bool:
    """Return whether the columns of a batch are the bytes of the file, and not copies that were decompressed."""
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None and buffer.size]
    return all(mapped.address <= buffer.address < mapped.address + mapped.size for buffer in buffers)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
