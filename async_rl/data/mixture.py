"""Several datasets as one: which source has the next prompt, and the cursor that issues the prompts of all.

After any number of prompts, no source is a whole prompt above or below its share by weight. Which one is next follows
from the weights and the counts alone, without any random state, so that a restored run continues exactly. Knows
``cursor``, ``dataset`` and ``errors``; its state is plain data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from itertools import chain, zip_longest
from typing import Any

import structlog

from async_rl.data.cursor import DatasetCursor
from async_rl.data.dataset import BadRow, Dataset
from async_rl.data.prompts import Row
from async_rl.errors import DatasetError
from async_rl.types import Prompt, source_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The datasets of data.sources by name, with their weights."""

    datasets: Mapping[str, Dataset]
    weights: Mapping[str, float]
    agents: Mapping[str, str] = field(default_factory=dict)
    """A hash of the settings of the agent that plays a source's rollouts; none for a source without an agent."""

    @property
    def rows(self) -> Iterator[Row]:
        """The usable rows in memory, one of each source in turn."""
        turns = zip_longest(*(dataset.rows for dataset in self.datasets.values()))
        return (row for row in chain.from_iterable(turns) if row is not None)

    @property
    def bad_rows(self) -> list[BadRow]:
        """The others among those that were read."""
        return [bad for dataset in self.datasets.values() for bad in dataset.bad_rows]


TrainSet = Dataset | Mixture
"""What is trained on: data.train, or data.sources."""


def open_cursor(found: TrainSet, *, shuffle: bool, seed: int) -> DatasetCursor | MixtureCursor:
    """Return the cursor that issues what is trained on."""
    if isinstance(found, Dataset):
        return DatasetCursor(found, shuffle=shuffle, seed=seed)
    return MixtureCursor(found, shuffle=shuffle, seed=seed)


class Shares:
    """Says which source comes next, by weights and by how many prompts each has had."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        exact = {name: Fraction(repr(float(weights[name]))) for name in sorted(weights)}
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        self._weights = {name: int(weight * scale) for name, weight in exact.items()}
        self._sum = sum(self._weights.values())
        # Tijdeman's rule for the chairman assignment problem, whose bound is the best there is: no source is more than
        # 1 - 1/m off. To take the one that is furthest behind would do for three sources, not for many.
        self._m = max(1, 2 * len(weights) - 2)
        self.issued = dict.fromkeys(self._weights, 0)
        """Prompts that each source has had."""

    def next(self) -> str:
        """Return the source that has the next prompt: of those that are due, the one that must not wait longest."""
        total, m = sum(self.issued.values()) + 1, self._m
        due = [
            name
            for name, weight in self._weights.items()
            if m * (weight * total - self.issued[name] * self._sum) >= self._sum or m == 1
        ]
        return min(due, key=lambda name: Fraction(self.issued[name] * m + m - 1, self._weights[name]))


class MixtureCursor:
    """Issues the prompts of several datasets, each with a cursor of its own; see ``DatasetCursor``.

    A prompt that is given back comes again before any new one, oldest first over all sources, and counts for no share.
    """

    def __init__(self, mixture: Mixture, *, shuffle: bool, seed: int) -> None:
        self._weights = {name: float(weight) for name, weight in sorted(mixture.weights.items())}
        self._agents = dict(mixture.agents)
        self._shares = Shares(self._weights)
        self._cursors = {
            name: DatasetCursor(dataset, shuffle=shuffle, seed=_seed(seed, name), source=name)
            for name, dataset in sorted(mixture.datasets.items())
        }
        self._returned: deque[str] = deque()  # the source of each prompt that was given back and not deferred
        self._removed: dict[str, Any] = {}  # states of sources that the run had once, should they be set again

    def next(self) -> Prompt:
        """Return the next prompt; there always is one."""
        if self._returned:
            return self._cursors[self._returned.popleft()].next()
        source = self._shares.next()
        prompt = self._cursors[source].next()
        self._shares.issued[source] += 1
        return prompt

    def give_back(self, prompt: Prompt, *, defer: bool = False) -> None:
        """Put a prompt back into circulation; see ``DatasetCursor.give_back``."""
        source = source_of(prompt.prompt_id)
        if source not in self._cursors:
            raise ValueError(f"prompt {prompt.prompt_id} is of no source of this run")
        self._cursors[source].give_back(prompt, defer=defer)
        if not defer:
            self._returned.append(source)

    def rest(self, prompt: Prompt, epochs: int) -> None:
        """Pass over the row of a prompt in so many epochs of its source; see ``DatasetCursor.rest``."""
        self._cursors[source_of(prompt.prompt_id)].rest(prompt, epochs)

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt that was, or will be, issued under this id; KeyError if it is not ``usable``."""
        if source_of(prompt_id) not in self._cursors:
            raise KeyError(prompt_id)
        return self._cursors[source_of(prompt_id)].prompt(prompt_id)

    def usable(self, prompt_id: str) -> bool:
        """Return whether a prompt that was issued can be used; false if its source was removed or its row is bad."""
        cursor = self._cursors.get(source_of(prompt_id))
        return cursor is not None and cursor.usable(prompt_id)

    def state(self) -> dict[str, Any]:
        """Return the position as plain data, for ``restore``. Prompts in flight are not part of it."""
        sources = {name: cursor.state() for name, cursor in self._cursors.items()}
        return {
            "sources": sources | self._removed,
            "weights": self._weights,
            "issued": dict(self._shares.issued),
            "returned": list(self._returned),
            "settings": {name: state["settings"] for name, state in sources.items()},
            "agents": self._agents,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of ``state``; new sources begin, and those that are gone are passed over.

        With other weights, or other sources, shares are counted from here on: they are not made up for. Raises
        DatasetError when the files of a source are not those that the state belongs to.
        """
        if "sources" not in state:
            raise DatasetError(
                "the run began with data.train, and data.sources is set now, whose prompts have other names; set "
                "data.train back, or start a run of another name"
            )
        before = state["sources"]
        for name, cursor in self._cursors.items():
            if name in before:
                try:
                    cursor.restore(before[name])
                except DatasetError as error:
                    raise DatasetError(
                        f"data.sources.{name}: {error}; or give the source another name, under which it is a new one"
                    ) from None
        self._removed = {name: before[name] for name in before if name not in self._cursors}
        self._shares = Shares(self._weights)
        if dict(state["weights"]) == self._weights:
            self._shares.issued |= state["issued"]
        else:
            log.info("source_weights_changed", before=dict(state["weights"]), now=self._weights)
        agents = state.get("agents", self._agents)  # earlier releases wrote none
        if changed := [name for name in self._cursors if name in before and agents.get(name) != self._agents.get(name)]:
            log.warning("source_agents_changed", sources=changed)
        self._returned = self._still_returned(state)

    def _still_returned(self, state: Mapping[str, Any]) -> deque[str]:
        """Return the sources of the prompts that come again, without those that are not usable any more."""
        left = {name: deque(each["returned"]) for name, each in state["sources"].items()}
        again = [left[name].popleft() for name in state["returned"]]
        again += chain.from_iterable(left.values())  # of sources that were removed, and may be there again
        return deque(source_of(prompt_id) for prompt_id in again if self.usable(prompt_id))


def _seed(seed: int, source: str) -> int:
    """Return the seed of a source's order, which is its own also where another source has as many rows."""
    return int.from_bytes(blake2b(f"{seed}/{source}".encode(), digest_size=6).digest(), "big")
