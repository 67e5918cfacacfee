"""Looks at everybody once a second: publishes what they count, and sees when nothing moves any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator
from typing import Any, NoReturn

import structlog

from async_rl.config.schema import RunConfig
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.recorder import Recorder
from async_rl.driver.stacks import dump_stacks
from async_rl.driver.watchdog import Situation, account
from async_rl.errors import StalledError
from async_rl.queue.client import QueueClient
from async_rl.rollout.stats import worker_id
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

_PERIOD_S = 1.0
# An actor that has not answered for so long does not count as alive.
_ANSWER_S = 5.0


class Monitor:
    """Of one run."""

    def __init__(
        self,
        config: RunConfig,
        queue: QueueClient,
        rollouts: RolloutWorkers,
        trainers: TrainerRanks,
        sync: WeightSync,
        recorder: Recorder,
    ) -> None:
        self._config = config
        self._queue = queue
        self._rollouts = rollouts
        self._trainers = trainers
        self._sync = sync
        self._recorder = recorder
        self._doing = ("other", time.monotonic())
        self._step = 0

    @contextlib.contextmanager
    def at(self, what: str, step: int) -> Iterator[None]:
        """For the watchdog and the timeline: what the training loop is at, for which training step."""
        before = self._doing[0]
        self._now_at(what, step)
        try:
            yield
        finally:
            self._now_at(before, step)

    def _now_at(self, what: str, step: int) -> None:
        (before, since), of_step = self._doing, self._step
        self._doing, self._step = (what, time.monotonic()), step
        self._recorder.training_loop_at(what)
        self._recorder.training_loop_was_at(before, self._doing[1] - since, of_step)

    async def run(self) -> None:
        """Raises StalledError when nothing has moved for watchdog.abort_s."""
        settings, told = self._config.watchdog, False
        while True:
            await asyncio.sleep(_PERIOD_S)
            stalled_s, situation = await self.count()
            if stalled_s < settings.stall_s:
                told = False
            elif not told:
                told = True
                line = account(situation, stalled_s)
                log.warning(line)
                self._recorder.event(line)
            if stalled_s >= settings.abort_s:
                await self._stalled(account(situation, stalled_s))

    async def _stalled(self, line: str) -> NoReturn:
        await dump_stacks([self._queue.actor, *self._rollouts.workers.values(), *self._trainers.actors])
        raise StalledError(
            f"{line}; the stacks of every process are in {self._config.run_dir / 'logs'} "
            f"(watchdog.abort_s = {self._config.watchdog.abort_s:g})"
        )

    async def count(self) -> tuple[float, Situation]:
        """Publish what was counted; seconds for which nothing has moved, and what everybody is at."""
        stats, workers = await asyncio.gather(_in_time(self._queue.stats()), self._rollouts.stats(_ANSWER_S))
        queue = stats or self._recorder.queue
        doing, since = self._doing
        silent = [worker_id(replica) for replica in self._rollouts.silent]
        absent = [worker_id(r) for r in self._rollouts.workers if r not in self._sync.members]
        situation = Situation(
            trainer=doing,
            trainer_s=time.monotonic() - since,
            queued_groups=0 if queue is None else queue.queued_groups,
            required_groups=self._config.required_groups,
            running={} if queue is None else queue.running,
            refusal=None if queue is None else queue.refusal,
            silent=[*silent, *(["the queue"] if stats is None else [])],
            absent=absent,
        )
        if queue is None:
            return 0.0, situation
        return self._recorder.counted(queue, workers, situation), situation


async def _in_time(call: Awaitable[Any]) -> Any:
    """What it answers; None where it does not within _ANSWER_S."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await call
    except TimeoutError:
        return None
