"""The dataset: reading a JSONL file, and the cursor that hands out its rows epoch after epoch.

Owns which prompt comes next and which line of the file was bad. Pure apart from reading the file: it knows
``types``, ``errors`` and what the wire can carry, and neither tokenizers (``encode`` is passed in) nor Ray (its objects
are plain data, so they pickle into an actor).
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
    """One good line of the file. fields: the object without its prompt field, for the reward."""

    line: int
    text: str
    token_ids: Int32Array
    fields: Mapping[str, Any]

    def prompt(self, prompt_id: str) -> Prompt:
        return Prompt(prompt_id=prompt_id, row=self.line, text=self.text, token_ids=self.token_ids, fields=self.fields)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be used, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one file. digest: of the file's bytes, so that a checkpoint notices another dataset."""

    path: Path
    rows: tuple[Row, ...]
    bad_rows: tuple[BadRow, ...]
    digest: str

    def first(self, count: int, *, label: str, key: str) -> tuple[Prompt, ...]:
        """The first ``count`` rows as prompts "<label>-<line>"; DatasetError naming ``key`` where there are fewer."""
        if count > len(self.rows):
            raise DatasetError(
                f"{self.path}: {key} asks for {count} prompts, the file has {len(self.rows)} usable rows"
            )
        return tuple(row.prompt(f"{label}-{row.line}") for row in self.rows[:count])

    def bad_row_report(self) -> str | None:
        """One sentence for the log: how many rows were skipped, and the first of them; None if all are good."""
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

    Raises DatasetError when the file cannot be read, holds no usable row, or has a bad one under
    on_bad_row="fail"; the message names file, line and what is wrong with it.
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
            raise DatasetError(f"{path}, line {row.line}: {row.reason}; mend the row, or set data.on_bad_row to skip")
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
        # The first line of a file may open with a byte-order mark, which is no part of the JSON.
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
        return BadRow(line, f"field {prompt_field!r} has half of a surrogate pair, which is no character")
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
    """The names of the fields, as far as they fit into a message."""
    return ascii(list(fields))[1:-1][:100] or "no fields"


class DatasetCursor:
    """Hands out the rows, epoch after epoch without end; each row once per epoch, shuffled anew by (seed, epoch).

    A prompt that is given back comes again before any new one, oldest first, under its old id. The position is
    (epoch, index into the epoch's order); the order itself follows from the seed and is never stored.
    """

    def __init__(self, dataset: Dataset, *, shuffle: bool, seed: int) -> None:
        self._rows = dataset.rows
        self._digest = dataset.digest
        self._path = dataset.path
        self._shuffle = shuffle
        self._seed = seed
        self._by_line = {row.line: row for row in dataset.rows}
        self._returned: dict[str, Prompt] = {}  # in the order they came back
        self._move_to(epoch=0, index=0)

    def next(self) -> Prompt:
        """The next prompt; there always is one."""
        if self._returned:
            return self._returned.pop(next(iter(self._returned)))
        if self._index == len(self._order):
            self._move_to(epoch=self._epoch + 1, index=0)
        row = self._rows[self._order[self._index]]
        self._index += 1
        return row.prompt(f"{self._epoch}-{row.line}")

    def give_back(self, prompt: Prompt) -> None:
        """Put a prompt that was handed out, and not trained, back into circulation.

        Raises ValueError for one that was never handed out or lies here already: its row would be trained twice.
        """
        if prompt.prompt_id in self._returned:
            raise ValueError(f"prompt {prompt.prompt_id} was given back before")
        if not self._was_issued(prompt.prompt_id):
            raise ValueError(f"prompt {prompt.prompt_id} was never handed out")
        self._returned[prompt.prompt_id] = prompt

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt that was, or will be, handed out under this id."""
        return self._by_line[_line(prompt_id)].prompt(prompt_id)

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, as plain data. Prompts in flight are not part of it: give them back first, or
        pass their ids to ``from_state``."""
        return {
            "digest": self._digest,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "epoch": self._epoch,
            "index": self._index,
            "returned": list(self._returned),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: with its order of the rows, whatever this cursor was made with.

        Raises DatasetError when the file is not the one that the state was taken on.
        """
        if state["digest"] != self._digest:
            raise DatasetError(f"{self._path} is not the dataset that the run began with; its contents have changed")
        self._shuffle, self._seed = state["shuffle"], state["seed"]
        self._move_to(epoch=state["epoch"], index=state["index"])
        self._returned = {prompt_id: self.prompt(prompt_id) for prompt_id in state["returned"]}

    def _move_to(self, *, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._positions: dict[int, int] | None = None  # line -> position in the epoch's order; made when asked for
        count = len(self._rows)
        self._order: list[int] = (
            np.random.default_rng([self._seed, epoch]).permutation(count).tolist()
            if self._shuffle
            else list(range(count))
        )

    def _was_issued(self, prompt_id: str) -> bool:
        epoch = int(prompt_id.partition("-")[0])
        if epoch != self._epoch:
            return epoch < self._epoch
        if self._positions is None:
            self._positions = {self._rows[at].line: position for position, at in enumerate(self._order)}
        return self._positions.get(_line(prompt_id), self._index) < self._index


def _line(prompt_id: str) -> int:
    """Of the dataset's file, from a prompt id "<epoch>-<line>"."""
    return int(prompt_id.partition("-")[2])
