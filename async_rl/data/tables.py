"""Parquet files as rows: a short one is decoded into memory, a long one unpacked once and mapped into memory.

A row of a Parquet file cannot be read without decoding the group of rows that it is in, often all of the file. Rows
that come in random order are therefore read from an Arrow file, which needs no decoding. Knows only pyarrow, which is
an extra, and ``errors``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b, file_digest
from itertools import repeat
from pathlib import Path
from typing import Any

from async_rl.errors import DatasetError, RowFault

_KIND = "Parquet"
_MAGIC = b"PAR1"
_BATCH = 1024  # rows of an Arrow file that lie together


class TableFile:
    """One Parquet file; see ``files.RowFile``."""

    unit = "row"

    def __init__(self, path: Path, cache: Path, in_memory: int) -> None:
        """Read what the file says of itself; unpack one of more than ``in_memory`` rows into the folder ``cache``.

        Raises DatasetError when it cannot be read, or pyarrow is not installed.
        """
        self.path = path
        parquet = _parquet(path)
        with named(path, _KIND):
            self.digest = digest_of(path)
            found = parquet.ParquetFile(path)
            self.count: int = found.metadata.num_rows
            self.columns: tuple[str, ...] | None = tuple(found.schema_arrow.names)
        self._unpacked = cache / f"{self.digest}.arrow" if self.count > in_memory else None
        self._table: Any = None
        if self._unpacked is not None and not self._unpacked.exists():
            batches = found.iter_batches(batch_size=_BATCH, use_threads=False)
            unpack(path, _KIND, self._unpacked, found.schema_arrow, batches)

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the row at ``index``; see ``RowFile.row``."""
        if self._table is None:
            self._table = self._open()
        return row_of(self._table, index)

    def column(self, name: str) -> Iterator[Any]:
        """Yield the value of every row; see ``RowFile.column``."""
        parquet = _parquet(self.path)
        with named(self.path, _KIND):
            has_it = self.columns is not None and name in self.columns
            column = parquet.ParquetFile(self.path).read(columns=[name] if has_it else [], use_threads=False)
        return values_of(column, name)

    def _open(self) -> Any:
        parquet = _parquet(self.path)
        with named(self.path, _KIND):
            if self._unpacked is None:
                return parquet.ParquetFile(self.path).read(use_threads=False)
        import pyarrow

        with named(self._unpacked, _KIND):
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(self._unpacked))).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None}


def digest_of(path: Path) -> str:
    """Return a hash of the contents of a file. Raises OSError."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def looks_like_parquet(path: Path) -> bool:
    """Return whether a file is meant to be Parquet: by its name, or by its first bytes."""
    if path.suffix == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def row_of(table: Any, index: int) -> dict[str, Any]:
    """Return a row of an Arrow table as an object. Raises RowFault where Python has no such values."""
    try:
        row: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # a date beyond Python's, text that is not UTF-8
        raise RowFault(f"it cannot be read ({' '.join(str(error).split())})") from None
    return row


def values_of(table: Any, name: str) -> Iterator[Any]:
    """Yield the values of a column of an Arrow table, None in each row of a table without it."""
    if name not in table.column_names:
        return repeat(None, table.num_rows)
    return (value.as_py() for value in table.column(name))


def unpack(path: Path, kind: str, target: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Write the rows of the file ``path`` to an Arrow file that can be mapped, batch by batch. Raises DatasetError."""
    import pyarrow

    building = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.OSFile(str(building), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        building.replace(target)
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) is None:
            raise _damaged(path, kind, error) from None
        raise DatasetError(
            f"dataset {path} has too many rows for data.rows_in_memory and cannot be unpacked to {target} ({error}); "
            "make room there, or set runs to another folder"
        ) from None
    finally:
        with suppress(OSError):
            building.unlink()


def _parquet(path: Path) -> Any:
    arrow_extra(path, _KIND)
    from pyarrow import parquet

    return parquet


def arrow_extra(path: Path, kind: str) -> None:
    """Raise DatasetError unless pyarrow is installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        article = "an" if kind[0] in "AEIOU" else "a"
        raise DatasetError(
            f"dataset {path} is {article} {kind} file, which needs pyarrow; install it: pip install 'async-rl[data]'"
        ) from None


@contextmanager
def named(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow and the disk raise into a DatasetError that names the file and its ``kind``."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        number = getattr(error, "errno", None)
        if number is None:  # pyarrow raises an OSError without a number for a damaged file
            raise _damaged(path, kind, error) from None
        raise DatasetError(f"dataset {path}: {os.strerror(number)}") from None


def _damaged(path: Path, kind: str, error: Exception) -> DatasetError:
    why = " ".join(str(error).split())[:200]
    return DatasetError(f"dataset {path} is not a whole {kind} file ({why}); copy or make it again")
