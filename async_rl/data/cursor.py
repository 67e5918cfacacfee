"""The cursor that issues the rows of a dataset as prompts, epoch after epoch.

Owns which prompt comes next, and decides it from its arguments alone; ``dataset`` reads the row, if it is on the disk.
It knows ``dataset``, ``types`` and ``errors``; its state is plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from async_rl.data.dataset import Dataset
from async_rl.data.prompts import Row
from async_rl.errors import DatasetError
from async_rl.types import Prompt


class DatasetCursor:
    """Issues each row once per epoch, epoch after epoch without end, in an order drawn from (seed, epoch).

    A prompt that is given back comes again before any new one, oldest first, under its old id; one that is deferred
    comes again at the end of the epoch. The position is (epoch, index into the epoch's order). The order itself follows
    from the seed and is never stored; with data.order_by it is ascending by that column, and by the seed among equal
    numbers. It is one of all rows of the files, of which the bad ones and those that rest are passed over: settings
    that make other rows bad, data.max_prompt_tokens for example, do not change it.
    """

    def __init__(self, dataset: Dataset, *, shuffle: bool, seed: int, source: str = "") -> None:
        """Begin with the first epoch. The ids of a named ``source`` begin with its name."""
        self._prefix = f"{source}/" if source else ""
        self._lines = dataset.lines
        self._digest = dataset.digest
        self._settings = dataset.settings
        self._path = dataset.path
        self._later = dataset.later
        self._order_by, self._keys = dataset.order_by, dataset.keys
        self._shuffle = shuffle
        self._seed = seed
        self._by_line = {row.line: row for row in dataset.rows}
        self._returned: dict[str, Prompt] = {}  # {prompt id: prompt}, oldest first
        self._deferred: dict[str, Prompt] = {}  # the same, of those that wait for the end of the epoch
        self._resting: dict[int, int] = {}  # {line: the epoch in which its row is issued again}
        self._by_rows = False  # whether the run began with release 0.1, whose order was one of the usable rows
        self._move_to(epoch=0, index=0)

    def next(self) -> Prompt:
        """Return the next prompt; there always is one."""
        if self._returned:
            return self._returned.pop(next(iter(self._returned)))
        began = self._epoch
        while True:
            if self._index == len(self._order):
                if self._deferred:
                    return self._deferred.pop(next(iter(self._deferred)))
                passed_over = self._epoch > began  # all rows of a whole epoch
                self._move_to(epoch=self._epoch + 1, index=0)
                resting = {} if passed_over else self._resting
                self._resting = {line: until for line, until in resting.items() if until > self._epoch}
            line = int(self._order[self._index])
            row = None if self._resting.get(line, 0) > self._epoch else self._row(line)
            self._index += 1
            if row is not None:
                return row.prompt(f"{self._prefix}{self._epoch}-{line}")

    def give_back(self, prompt: Prompt, *, defer: bool = False) -> None:
        """Put a prompt that was issued, and not trained, back into circulation; with ``defer`` behind all new ones.

        Raises ValueError for one that was never issued or was given back already: its row would be trained twice.
        """
        if prompt.prompt_id in self._returned or prompt.prompt_id in self._deferred:
            raise ValueError(f"prompt {prompt.prompt_id} was given back before")
        if not self._was_issued(prompt.prompt_id):
            raise ValueError(f"prompt {prompt.prompt_id} was never issued")
        (self._deferred if defer else self._returned)[prompt.prompt_id] = prompt

    def rest(self, prompt: Prompt, epochs: int) -> None:
        """Pass over the row of a prompt in so many epochs after its own."""
        epoch, line = _epoch(prompt.prompt_id), _line(prompt.prompt_id)
        self._resting[line] = max(epoch + epochs + 1, self._resting.get(line, 0))

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt that was, or will be, issued under this id; KeyError if it is not ``usable``."""
        row = self._row(_line(prompt_id))
        if row is None:
            raise KeyError(prompt_id)
        return row.prompt(prompt_id)

    def usable(self, prompt_id: str) -> bool:
        """Return whether the row of a prompt that was issued can be used; false if it is bad by other settings now."""
        return self._row(_line(prompt_id)) is not None

    def state(self) -> dict[str, Any]:
        """Return the position as plain data, for ``restore``. Prompts in flight are not part of it."""
        return {
            "digest": self._digest,
            "settings": self._settings,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "epoch": self._epoch,
            "index": self._index,
            "returned": list(self._returned),
            "deferred": list(self._deferred),
            "resting": [[line, until] for line, until in self._resting.items()],
            "usable_rows": len(self._by_line),
            "order_of": "rows" if self._by_rows else "lines",
            "order_by": self._order_by,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of ``state``, in its order of rows: its shuffle and seed replace this cursor's.

        Prompts that were to come again are forgotten where they are not ``usable``. Raises DatasetError when the file
        is not the one that the state belongs to, or its usable rows are others and the run began with release 0.1.
        """
        if "sources" in state:
            raise DatasetError(
                f"the run began with data.sources ({', '.join(state['sources'])}), and data.train is set now; set "
                "data.sources back, or start a run of another name"
            )
        if state["digest"] != self._digest:
            raise DatasetError(
                f"{self._path} is not the dataset that the run started with: its contents have changed; "
                "put the old file back, or start a run of another name"
            )
        if (column := state.get("order_by")) != self._order_by:
            raise DatasetError(
                f"data.order_by of {self._path} is {self._order_by or 'null'} and was {column or 'null'}: the run's "
                f"place in one order is none in the other; set it back to {column or 'null'}, or start a run of another"
                " name"
            )
        self._by_rows = state.get("order_of", "rows") == "rows"  # both since 0.2
        if self._by_rows and self._later is not None:
            raise DatasetError(
                f"{self._path} has {self._lines} rows, more than data.rows_in_memory, and a run that began with "
                f"release 0.1 needs all of them in memory; set data.rows_in_memory to {self._lines}"
            )
        if self._by_rows and (before := state.get("usable_rows")) not in (None, len(self._by_line)):
            raise DatasetError(
                f"{self._path} has {len(self._by_line)} usable rows, and had {before}: a run that began with release "
                "0.1 cannot change them; set data.max_prompt_tokens, data.prompt_field and the tokenizer back to what "
                "they were, or start a run of another name"
            )
        self._shuffle, self._seed = state["shuffle"], state["seed"]
        self._move_to(epoch=state["epoch"], index=state["index"])
        self._returned = self._prompts(state["returned"])
        self._deferred = self._prompts(state.get("deferred", ()))  # since 0.2
        self._resting = dict(state.get("resting", ()))  # since 0.2

    def _prompts(self, prompt_ids: Iterable[str]) -> dict[str, Prompt]:
        return {prompt_id: self.prompt(prompt_id) for prompt_id in prompt_ids if self.usable(prompt_id)}

    def _move_to(self, *, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._positions: npt.NDArray[np.int64] | None = None  # of each line in the epoch's order, built when needed
        lines = np.arange(1, self._lines + 1, dtype=np.int64)
        if self._by_rows:
            lines = np.array(list(self._by_line), np.int64)
        self._order: npt.NDArray[np.int64] = (
            np.random.default_rng([self._seed, epoch]).permutation(lines) if self._shuffle else lines
        )
        if self._keys is not None:  # rows of equal numbers stay in that order
            self._order = self._order[np.argsort(self._keys[self._order - 1], kind="stable")]

    def _row(self, line: int) -> Row | None:
        """Return a row, None for one that cannot be used. Raises DatasetError, see ``LaterRows.row``."""
        if self._later is not None and self._later.first <= line <= self._lines:
            return self._later.row(line)
        return self._by_line.get(line)

    def _was_issued(self, prompt_id: str) -> bool:
        epoch = _epoch(prompt_id)
        if epoch != self._epoch:
            return epoch < self._epoch
        if self._positions is None:
            self._positions = np.full(self._lines + 1, self._lines)  # behind the last, for lines that are in no order
            self._positions[self._order] = np.arange(len(self._order))
        line = _line(prompt_id)
        return 1 <= line <= self._lines and bool(self._positions[line] < self._index)


def _epoch(prompt_id: str) -> int:
    """Return the epoch that a prompt id "<source>/<epoch>-<line>" names."""
    return int(_of_row(prompt_id)[0])


def _line(prompt_id: str) -> int:
    """Return the line of the dataset's file that a prompt id "<source>/<epoch>-<line>" names."""
    return int(_of_row(prompt_id)[2])


def _of_row(prompt_id: str) -> tuple[str, str, str]:
    return prompt_id.rpartition("/")[2].partition("-")
