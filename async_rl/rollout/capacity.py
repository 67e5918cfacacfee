"""How many groups a worker may begin: as many as fill its replica, and no more than it can hold.

Of agents, whose rollouts wait for tools, ``making`` decides that.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from async_rl.config.rollouts import RolloutSection
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.partial import PartialRollout

Sample = Callable[..., Awaitable[PartialRollout]]
"""Makes an engine call, and returns the state after it."""


class Capacity:
    """The places of one replica, and what takes them: responses that have not ended, and groups not yet published."""

    def __init__(self, settings: RolloutSection, sample: Sample) -> None:
        """``sample`` is ``EngineCalls.sample``."""
        self._sample = sample
        self._limit, self._n = settings.trajectory_limit, settings.n
        # Twice what fills the replica: a group with one long response must not leave the places of its other responses
        # empty, and finished groups that wait for capacity in the queue must not pile up.
        self._max_groups = 2 * -(-self._limit // self._n)
        self._groups: set[str] = set()
        self._unfinished = 0
        self._free = asyncio.Event()
        self._update()

    @property
    def free_groups(self) -> int:
        """How many groups fill the replica's free places, counting one that fits in part."""
        return max(0, min(self._wanted(), self._max_groups - len(self._groups)))

    def _wanted(self) -> int:
        return -(-(self._limit - self._unfinished) // self._n)

    async def watch(self) -> NoReturn:
        """Keep the places up to date with what the engine reports, where that matters."""
        await asyncio.Future[NoReturn]()
        raise AssertionError

    async def all_begun(self, group_id: str, responses: Iterable[asyncio.Task[Any]]) -> None:
        """Return once all responses of a group have begun, or one of the tasks that make them has failed."""

    def close(self) -> None:
        """Let no further response begin."""

    async def wait(self) -> int:
        """Return how many groups may begin, once there is one."""
        while not (free := self.free_groups):
            self._free.clear()
            await self._free.wait()
        return free

    def begin_group(self, group_id: str) -> None:
        """Count a group whose responses begin, once."""
        if group_id not in self._groups:
            self._groups.add(group_id)
            self._unfinished += self._n
            self._update()

    def end_group(self, group_id: str) -> None:
        """Count a group no longer."""
        self._groups.discard(group_id)
        self._update()

    def is_made(self, group_id: str) -> None:
        """Count a rollout of a group that has ended already, in another worker."""
        del group_id
        self._unfinished -= 1
        self._update()

    @asynccontextmanager
    async def rollout(self, group: InFlight, index: int) -> AsyncIterator[Sample]:
        """Wait until a rollout may begin, and count it as unfinished until this ends.

        Yields what makes its engine calls: (partial rollout, request id, stop strings) -> the state after one more.
        """
        del index
        try:
            yield functools.partial(self._sample, group.ticket.prompt)
        finally:
            self._unfinished -= 1
            self._update()

    def _update(self) -> None:
        if self.free_groups > 0:
            self._free.set()
        else:
            self._free.clear()
