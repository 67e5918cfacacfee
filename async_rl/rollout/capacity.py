"""How many groups a worker may begin: as many as fill its replica, and no more than it can hold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from async_rl.config.rollouts import RolloutSection


class Capacity:
    """The places of one replica, and what takes them: responses that have not ended, and groups not yet published."""

    def __init__(self, settings: RolloutSection) -> None:
        self._places, self._n = settings.trajectory_limit, settings.n
        # Twice what fills the replica: a group with one long response must not leave the places of its other responses
        # empty, and finished groups that wait for capacity in the queue must not pile up.
        self._max_groups = 2 * -(-self._places // self._n)
        self._groups = self._unfinished = 0
        self._free = asyncio.Event()
        self._update()

    @property
    def free_groups(self) -> int:
        """How many groups fill the replica's free places, counting one that fits in part."""
        free = self._places - self._unfinished
        return max(0, min(-(-free // self._n), self._max_groups - self._groups))

    async def wait(self) -> None:
        """Return once a group may begin."""
        await self._free.wait()

    def begin_group(self) -> None:
        """Count a group whose responses begin."""
        self._groups += 1
        self._unfinished += self._n
        self._update()

    def end_group(self) -> None:
        """Count a group no longer."""
        self._groups -= 1
        self._update()

    @contextmanager
    def response(self) -> Iterator[None]:
        """Count a response of a group as unfinished until this ends."""
        try:
            yield
        finally:
            self._unfinished -= 1
            self._update()

    def _update(self) -> None:
        if self.free_groups > 0:
            self._free.set()
        else:
            self._free.clear()
