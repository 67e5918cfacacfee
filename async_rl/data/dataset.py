"""The dataset: one JSONL file, read and tokenized, and which of its lines are bad.

Pure apart from reading the file: it knows ``types``, ``errors`` and what the wire can carry, and neither tokenizers
(``encode`` is passed in) nor Ray (its objects are plain data, so they pickle into an actor).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from async_rl.errors import DatasetError
from async_rl.queue.wire import check_json_like
from async_rl.types import Int32Array, Prompt

Encode = Callable[[str], Sequence[int]]

# How many bad lines a report names; the count covers the rest.
REPORTED_LINES = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One usable line of the file."""

    line: int
    """Number of the line, from 1."""
    text: str
    token_ids: Int32Array
    fields: Mapping[str, Any]
    """The line's JSON object without its prompt field, for the reward."""

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the row as a prompt under this id."""
        return Prompt(prompt_id=prompt_id, row=self.line, text=self.text, token_ids=self.token_ids, fields=self.fields)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be used, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one file."""

    path: Path
    rows: tuple[Row, ...]
    bad_rows: tuple[BadRow, ...]
    digest: str
    """Hash of the file's bytes, so that a restored run notices a changed dataset."""

    @property
    def lines(self) -> int:
        """Number of lines of the file, usable or not."""
        return len(self.rows) + len(self.bad_rows)

    def first(self, count: int, *, label: str, key: str) -> tuple[Prompt, ...]:
        """Return the first ``count`` rows as prompts "<label>-<line>".

        Raises DatasetError, naming the setting ``key``, when there are fewer.
        """
        if count > len(self.rows):
            raise DatasetError(
                f"{self.path}: {key} asks for {count} prompts, but the file has {len(self.rows)} usable rows"
            )
        return tuple(row.prompt(f"{label}-{row.line}") for row in self.rows[:count])

    def bad_row_report(self) -> str | None:
        """Return one sentence on how many rows were skipped, and the first of them; None if all are usable."""
        if not self.bad_rows:
            return None
        named = "; ".join(f"line {bad.line}: {bad.reason}" for bad in self.bad_rows[:REPORTED_LINES])
        more = len(self.bad_rows) - REPORTED_LINES
        total = len(self.bad_rows) + len(self.rows)
        return f"{self.path}: {len(self.bad_rows)} of {total} rows are bad: {named}" + (
            f"; and {more} more" if more > 0 else ""
        )


def read_jsonl(
    path: Path,
    *,
    encode: Encode,
    prompt_field: str,
    max_prompt_tokens: int,
    on_bad_row: Literal["skip", "fail"],
) -> Dataset:
    """Read and tokenize every line of ``path``.

    Raises DatasetError when the file cannot be read, has no usable row, or has a bad one under
    on_bad_row="fail". The message names file, line and fault.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"dataset {path}: {error.strerror}") from None
    rows: list[Row] = []
    bad_rows: list[BadRow] = []
    for line, raw in enumerate(content.splitlines(), start=1):
        row = _parse(line, raw, encode, prompt_field, max_prompt_tokens)
        if isinstance(row, Row):
            rows.append(row)
        elif on_bad_row == "fail":
            raise DatasetError(f"{path}, line {row.line}: {row.reason}; fix the row, or set data.on_bad_row to skip")
        else:
            bad_rows.append(row)
    dataset = Dataset(path, tuple(rows), tuple(bad_rows), blake2b(content, digest_size=16).hexdigest())
    if not rows:
        raise DatasetError(dataset.bad_row_report() or f"dataset {path} is empty; it needs one JSON object per line")
    return dataset


def _parse(line: int, raw: bytes, encode: Encode, prompt_field: str, max_prompt_tokens: int) -> Row | BadRow:
    if not raw.strip():
        return BadRow(line, "the line is empty")
    try:
        # The first line of a file may start with a byte-order mark, which is not part of the JSON.
        value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(line, f"not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRow(line, f"not JSON ({error})")
    if not isinstance(value, dict):
        return BadRow(line, f"expected a JSON object, got {type(value).__name__}")
    if prompt_field not in value:
        return BadRow(line, f"no field {prompt_field!r} (data.prompt_field); it has {_short(value)}")
    text = value[prompt_field]
    if not isinstance(text, str):
        return BadRow(line, f"field {prompt_field!r} is {type(text).__name__}, not a string")
    if not _is_utf8(text):
        return BadRow(line, f"field {prompt_field!r} has half of a surrogate pair, which is not a character")
    if not text.strip():
        return BadRow(line, f"field {prompt_field!r} is empty")
    token_ids = np.asarray(encode(text), dtype=np.int32)
    if len(token_ids) == 0:
        return BadRow(line, f"field {prompt_field!r} has no tokens")
    if len(token_ids) > max_prompt_tokens:
        return BadRow(
            line, f"prompt of {len(token_ids)} tokens, more than data.max_prompt_tokens = {max_prompt_tokens}"
        )
    fields = {key: field for key, field in value.items() if key != prompt_field}
    try:
        check_json_like(fields, "the row")
    except TypeError as error:
        return BadRow(line, str(error))
    return Row(line, text, token_ids, fields)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(fields: Mapping[str, Any]) -> str:
    """Return the names of the fields, as far as they fit into a message."""
    return ascii(list(fields))[1:-1][:100] or "no fields"
