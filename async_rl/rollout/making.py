"""The rollouts of agents that a worker has in the making: those that wait to begin, and what those that have begun do.

``admission`` decides which begin; this asks the engine for its load, wakes rollouts in the order of their coming, and
sees the engine calls of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from async_rl.config.rollouts import RolloutSection
from async_rl.errors import EngineError
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.admission import Admission
from async_rl.rollout.capacity import Capacity, Sample
from async_rl.rollout.engine.interface import ReportsLoad, RolloutEngine
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.prefixes import Computed, in_common

# How often an engine is asked for its load; rollouts take seconds to hours.
_ASKED_EVERY_S = 0.5

# An engine that does not answer by then is asked again. ``engine.liveness`` says what is wrong with it.
_ANSWER_S = 5.0


@dataclass(slots=True, eq=False)
class _Coming:
    """A rollout that waits until it may begin."""

    group_id: str
    rollout_id: str
    turn: asyncio.Future[None]
    let_in: bool = False


class Making:
    """A rollout in the making: what its engine calls mean to admission."""

    def __init__(self, admission: Admission, rollout_id: str, changed: Callable[[], None]) -> None:
        self._admission, self._id, self._changed = admission, rollout_id, changed
        self._last: dict[str, PartialRollout] = {}  # by trajectory id, as its last call has left it
        self._shared: dict[str, tuple[int, Computed]] = {}  # what a trajectory has in common with others, by its id

    def calls(self, sample: Sample) -> Sample:
        """Return ``sample`` as the rollout is to call it."""

        async def call(partial: PartialRollout, request_id: str, stop: Sequence[str] = ()) -> PartialRollout:
            name = partial.trajectory_id
            if name not in self._shared:
                self._shared[name] = self._begins_with(partial)
            shared, before = self._shared[name]
            self._admission.call(self._id, name)
            finished = True
            try:
                after = await sample(partial, request_id, stop, before)
                self._last[name], finished = after, after.finished
                self._admission.holds(self._id, name, len(after.prompt_ids) + len(after.response_ids) - shared)
            finally:
                if finished:  # else it was interrupted, and asks again at once
                    self._admission.answered(self._id, name)
                    self._changed()
            return after

        return call

    def _begins_with(self, partial: PartialRollout) -> tuple[int, Computed]:
        if self._shared:
            return in_common(partial.prompt_ids, self._last.values())
        prompt = len(partial.prompt_ids)
        self._admission.shares(self._id, prompt)
        return prompt, Computed()


class AgentCapacity(Capacity):
    """The places of a replica of a run with agents."""

    def __init__(self, settings: RolloutSection, sample: Sample, engine: RolloutEngine) -> None:
        self._admission = Admission(settings.max_num_seqs, settings.trajectory_limit, settings.n, settings.max_kv_use)
        self._engine = engine
        self._closed = False
        self._begun: dict[str, asyncio.Event] = {}  # by group: all of its rollouts have begun
        self._waiting: deque[_Coming] = deque()
        self._uses: list[float] = []  # of the KV cache, at the beginning of rollouts since they were published
        super().__init__(settings, sample)

    @property
    def open(self) -> int:
        """Rollouts in the making."""
        return self._admission.open

    def _wanted(self) -> int:
        return self._admission.groups(time.monotonic())

    def begin_group(self, group_id: str) -> None:
        if group_id not in self._begun:
            self._admission.begin_group(group_id)
            self._begun[group_id] = asyncio.Event()
            super().begin_group(group_id)

    def end_group(self, group_id: str) -> None:
        self._admission.end_group(group_id)
        self._begun.pop(group_id, None)
        super().end_group(group_id)

    def is_made(self, group_id: str) -> None:
        self._admission.is_made(group_id)
        self._note_begun(group_id)
        self._update()

    def close(self) -> None:
        self._closed = True

    async def all_begun(self, group_id: str, responses: Iterable[asyncio.Task[Any]]) -> None:
        begun = asyncio.create_task(self._begun[group_id].wait())
        pending: set[asyncio.Task[Any]] = {begun, *responses}
        try:
            while begun in pending and len(pending) > 1:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if any(task.cancelled() or task.exception() for task in done):
                    return
        finally:
            begun.cancel()

    @contextlib.asynccontextmanager
    async def rollout(self, group: InFlight, index: int) -> AsyncIterator[Sample]:
        rollout_id = group.trajectory_id(index)
        coming = _Coming(group.group_id, rollout_id, asyncio.get_running_loop().create_future())
        self._waiting.append(coming)
        self._update()
        try:
            await coming.turn
            sample = functools.partial(self._sample, group.ticket.prompt)
            yield Making(self._admission, rollout_id, self._update).calls(sample)
        finally:
            if coming.let_in:
                self._admission.end(rollout_id)
            elif coming in self._waiting:
                self._waiting.remove(coming)
            self._update()

    async def watch(self) -> NoReturn:
        while True:
            if isinstance(self._engine, ReportsLoad):
                with contextlib.suppress(EngineError, TimeoutError):
                    async with asyncio.timeout(_ANSWER_S):
                        self._admission.report(await self._engine.load())
            self._update()
            await asyncio.sleep(_ASKED_EVERY_S)

    def publish(self, metrics: Metrics) -> None:
        """Bring the metrics of admission on /metrics up to date."""
        metrics.set("rollouts_in_the_making", self._admission.open)
        metrics.set("rollouts_waiting", len(self._waiting))
        metrics.set("rollouts_kv_use", self._admission.kv_use)
        uses, self._uses = self._uses, []
        metrics.observe_each("kv_use_at_admission", uses)

    def _update(self) -> None:
        while self._waiting and not self._closed and self._admission.room(now := time.monotonic()):
            coming = self._waiting.popleft()
            if coming.turn.done():
                continue  # cancelled, and not aware of it yet
            self._uses.append(self._admission.kv_use)
            self._admission.begin(coming.rollout_id, coming.group_id, now)
            self._note_begun(coming.group_id)
            coming.let_in = True
            coming.turn.set_result(None)
        super()._update()

    def _note_begun(self, group_id: str) -> None:
        if self._admission.all_begun(group_id):
            self._begun[group_id].set()
