"""Which data-parallel rank of an engine computes which call. Pure.

Each rank has a KV cache of its own. A rollout's calls go to one rank, whose cache has what came before; a rollout
begins with the rank that has the fewest calls.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

# Rollouts that are remembered, those longest without a call forgotten first.
_REMEMBERED = 10_000


class Ranks:
    """The ranks of one engine. A rollout leaves its rank for another that has ``spread`` calls less."""

    def __init__(self, count: int, spread: int) -> None:
        self._calls = [0] * count
        self._spread = spread
        self._of: OrderedDict[str, int] = OrderedDict()

    @contextlib.contextmanager
    def one_for(self, request_id: str) -> Iterator[int]:
        """Yield the rank of a call, which it has for the block. Ids begin with group and rollout: ``0-7.0/3/...``."""
        rollout = "/".join(request_id.split("/")[:2])
        least = min(range(len(self._calls)), key=self._calls.__getitem__)
        rank = self._of.pop(rollout, least)
        if self._calls[rank] - self._calls[least] >= self._spread:
            rank = least
        self._of[rollout] = rank
        if len(self._of) > _REMEMBERED:
            self._of.popitem(last=False)
        self._calls[rank] += 1
        try:
            yield rank
        finally:
            self._calls[rank] -= 1
