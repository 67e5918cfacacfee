"""The dataset: which rows of its files are usable, and the prompts that they are.

It knows ``files``, ``prompts``, ``types`` and ``errors``, and neither tokenizers (the ``RowReader`` has one) nor Ray.
Its objects pickle into an actor; what is on the disk stays there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.data.files import Files
from async_rl.data.prompts import Row, RowReader, as_number
from async_rl.errors import DatasetError, RowFault
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

OnBadRow = Literal["skip", "fail"]

# How many bad rows a report names; the count covers the rest.
REPORTED_ROWS = 5


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str
    place: str = ""
    """Where it is: "line 3", with the file if the dataset has several; empty for the line of the only file."""

    def __str__(self) -> str:
        return f"{self.place or f'line {self.line}'}: {self.reason}"


@dataclass(frozen=True, slots=True)
class LaterRows:
    """The rows behind those that were read when the run started. Each is read when its turn comes."""

    files: Files
    reader: RowReader
    on_bad_row: OnBadRow
    first: int
    """Number of the first of them."""

    @property
    def count(self) -> int:
        """Number of rows, usable or not."""
        return self.files.count - self.first + 1

    def row(self, line: int) -> Row | None:
        """Return a row, None for one to skip. Raises DatasetError for a bad one under on_bad_row="fail"."""
        found = read_row(self.files, line, self.reader)
        if isinstance(found, Row):
            return found
        if self.on_bad_row == "fail":
            raise DatasetError(
                f"{self.files.full_place(line)}: {found.reason}; set data.on_bad_row to skip and resume the run, or "
                "fix the row and start another; async-rl data checks every row before a run does"
            )
        log.warning("row_skipped", row=self.files.full_place(line), reason=found.reason)
        return None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one or several files, as many as were asked for in memory and the rest on the disk."""

    path: Path | str
    """What messages call it: the path of the file, or of the first of several and their number."""
    rows: tuple[Row, ...]
    """The usable rows among those that were read."""
    bad_rows: tuple[BadRow, ...]
    """The others among those that were read."""
    digest: str
    """Hash of the files' bytes, so that a restored run notices a changed dataset."""
    later: LaterRows | None = None
    """The rows that were not read; None if all were."""
    settings: str = ""
    """Hash of what decides which prompt a row becomes, so that a restored run can say that it has changed."""
    order_by: str | None = None
    """The column of numbers by which rows come, ascending; None for none."""
    keys: npt.NDArray[np.float64] | None = field(default=None, compare=False)
    """Its value in each row, usable or not."""

    @property
    def lines(self) -> int:
        """Number of rows of all files, usable or not."""
        return len(self.rows) + len(self.bad_rows) + (self.later.count if self.later else 0)

    def first(self, count: int | None, *, label: str, key: str) -> tuple[Prompt, ...]:
        """Return the first ``count`` usable rows, None for all, as prompts "<label>-<row>".

        Raises DatasetError, naming the setting ``key``, when there are fewer.
        """
        wanted = self.lines if count is None else count
        found = list(self.rows[:wanted])
        if self.later is not None:
            line = self.later.first
            while len(found) < wanted and line <= self.lines:
                if (row := self.later.row(line)) is not None:
                    found.append(row)
                line += 1
        if count is not None and count > len(found):
            raise DatasetError(
                f"{self.path}: {key} asks for {count} prompts, but the file has {len(found)} usable rows"
            )
        return tuple(row.prompt(f"{label}-{row.line}") for row in found)

    def bad_row_report(self) -> str | None:
        """Return one sentence on how many rows were skipped, and the first of them; None if all are usable."""
        if not self.bad_rows:
            return None
        named = "; ".join(map(str, self.bad_rows[:REPORTED_ROWS]))
        more = len(self.bad_rows) - REPORTED_ROWS
        total = len(self.bad_rows) + len(self.rows)
        return f"{self.path}: {len(self.bad_rows)} of {total} rows are bad: {named}" + (
            f"; and {more} more" if more > 0 else ""
        )


def read_dataset(
    files: Files, reader: RowReader, *, on_bad_row: OnBadRow, in_memory: int | None = None, settings: str = ""
) -> Dataset:
    """Read the first ``in_memory`` rows, all by default, and leave the others for later.

    Raises DatasetError when there is no usable row among them, one is bad under on_bad_row="fail", or a file of a table
    has no column for the prompt. The message names file, row and fault.
    """
    check_columns(files, reader)
    rows: list[Row] = []
    bad_rows: list[BadRow] = []
    count = files.count if in_memory is None else min(files.count, in_memory)
    for line in range(1, count + 1):
        row = read_row(files, line, reader)
        if isinstance(row, Row):
            rows.append(row)
        elif on_bad_row == "fail":
            raise DatasetError(f"{files.full_place(line)}: {row.reason}; fix the row, or set data.on_bad_row to skip")
        else:
            bad_rows.append(row)
    later = LaterRows(files, reader, on_bad_row, count + 1) if count < files.count else None
    by = reader.order_by
    keys = None if by is None else _keys(files, by)
    dataset = Dataset(files.name, tuple(rows), tuple(bad_rows), files.digest, later, settings, by, keys)
    if not rows:
        raise DatasetError(
            dataset.bad_row_report() or f"dataset {files.name} is empty; it needs one JSON object per line"
        )
    return dataset


def _keys(files: Files, column: str) -> npt.NDArray[np.float64]:
    """Return the number of each row in a column, float64[rows]; bad rows, which have none, come last."""
    found = (as_number(value) for value in files.column(column))
    return np.fromiter((np.inf if key is None else key for key in found), np.float64, files.count)


def read_row(files: Files, line: int, reader: RowReader) -> Row | BadRow:
    """Return the row ``line`` as a prompt, or why it cannot be one. Raises DatasetError for a damaged file."""
    try:
        return reader.read(line, files.row(line))
    except RowFault as fault:
        return BadRow(line, str(fault), files.place(line))


def check_columns(files: Files, reader: RowReader) -> None:
    """Raise DatasetError for a file whose rows all lack the prompt, naming the columns that it has."""
    for path, columns in files.columns:
        if reader.prompt_field not in columns:
            raise DatasetError(
                f"{path} has no column {reader.prompt_field!r} (data.prompt_field); it has {', '.join(columns)[:200]}"
            )
        if reader.order_by is not None and reader.order_by not in columns:
            raise DatasetError(
                f"{path} has no column {reader.order_by!r} (data.order_by); it has {', '.join(columns)[:200]}"
            )
        if twice := [name for name, count in Counter(columns).items() if count > 1]:
            raise DatasetError(f"{path} has the column {twice[0]!r} twice; rename one of them")
