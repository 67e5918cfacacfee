"""Polls every actor once a second, publishes its counters, and detects when the run has stalled.

Part of the driver: it can end the run. The other modules that watch do not. ``driver.watchdog`` is the pure rule that
this module applies, ``observe.watch`` shows a run folder in a terminal from another process, and ``doctor`` checks
machine and config before a run starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import psutil
import ray
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.recorder import Recorder
from async_rl.driver.watchdog import EndShare, RunSnapshot, Watchdog, describe_stall
from async_rl.errors import NothingToLearn, StalledError, TooManyFailures
from async_rl.queue.client import QueueClient
from async_rl.rollout.stats import worker_id
from async_rl.runtime import timeouts
from async_rl.runtime.process import DUMP_STACKS
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

T = TypeVar("T")

_PERIOD_S = 1.0
# rollout.max_failed_ratio is of the groups of so many training steps, and of at least so many groups: an outage of a
# minute must not end a run, nor the first prompts of a dataset.
_WINDOW_STEPS = 4
_LEAST_WINDOW = 100
# rollout.filter.max_share is of so many groups: at its default of 0.95, a run whose true share is 0.9 has more than 190
# of 200 filtered in one window of 280, and never for watchdog.abort_s.
_FILTER_WINDOW = 200
# vLLM's name for the engine's own process, which is a child of its worker's.
_ENGINE = "EngineCore"
_STACKS_WRITTEN_S = 2.0


class Monitor:
    """Polls all processes of one run, and knows in which phase the training loop is."""

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
        self._failures = EndShare(max(_LEAST_WINDOW, _WINDOW_STEPS * config.required_groups))
        self._filtered = EndShare(_FILTER_WINDOW)
        self._over_share = Watchdog()
        self._share_logged = False
        self._phase, self._since = "other", time.monotonic()
        self._step = 0
        self._computed = 0

    @contextlib.contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Tell watchdog and timeline that the training loop is in this phase, for training step ``step``."""
        before = self._phase
        self._enter_phase(name, step)
        try:
            yield
        finally:
            self._enter_phase(before, step)

    def _enter_phase(self, name: str, step: int) -> None:
        before, since, before_step = self._phase, self._since, self._step
        self._phase, self._since, self._step = name, time.monotonic(), step
        self._computed += name == "update"
        self._recorder.training_loop_at(name)
        self._recorder.record_phase(before, self._since - since, before_step)

    async def run(self) -> None:
        """Poll until cancelled.

        Raises StalledError when nothing has moved for watchdog.abort_s, TooManyFailures and NothingToLearn.
        """
        settings, logged = self._config.watchdog, False
        while True:
            await asyncio.sleep(_PERIOD_S)
            stalled_s, snapshot = await self.poll()
            if stalled_s < settings.stall_s:
                logged = False
            elif not logged:
                logged = True
                description = describe_stall(snapshot, stalled_s)
                log.warning("watchdog_stalled", stalled_s=round(stalled_s), description=description)
                self._recorder.event("watchdog_stalled", stalled_s=round(stalled_s), description=description)
            if stalled_s >= settings.abort_s:
                await self._abort(describe_stall(snapshot, stalled_s))
            self._check_failures()
            self._check_filtered(time.monotonic())

    async def poll(self) -> tuple[float, RunSnapshot]:
        """Publish all counters. Returns the seconds for which nothing has moved, and what each process does."""
        stats, workers = await asyncio.gather(_in_time(self._queue.stats()), self._rollouts.stats(timeouts.ANSWER_S))
        queue = stats or self._recorder.queue
        silent = [worker_id(replica) for replica in self._rollouts.silent]
        snapshot = RunSnapshot(
            phase=self._phase,
            phase_s=time.monotonic() - self._since,
            computed=self._computed,
            queued_groups=0 if queue is None else queue.queued_groups,
            required_groups=self._config.required_groups,
            in_flight={} if queue is None else queue.in_flight,
            refusal=None if queue is None else queue.refusal,
            unresponsive=[*silent, *(["the queue"] if stats is None else [])],
            restarting=[worker_id(r) for r in self._rollouts.workers if r not in self._sync.members],
            without_host=self._config.rollout.replica_range.max - len(self._rollouts.workers),
        )
        if queue is None:
            return 0.0, snapshot
        return self._recorder.update_counts(queue, workers, snapshot), snapshot

    async def last_poll(self) -> None:
        """Publish all counters once more, because the run ends: the groups of its last step count, too."""
        with contextlib.suppress(Exception):  # of actors that are what the run ends for
            await asyncio.wait_for(self.poll(), timeouts.ANSWER_S)

    def _check_failures(self) -> None:
        queue, limit = self._recorder.queue, self._config.rollout.max_failed_ratio
        if queue is None:
            return
        counts = queue.counts
        if self._failures.look(counts.trained + counts.filtered, counts.failed) <= limit:
            return
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sorted(queue.failed.items()))
        raise TooManyFailures(
            f"more than rollout.max_failed_ratio = {limit:g} of the last groups failed (in all {reasons}); the reason "
            f"of each is a line `group_failed` in {self._config.run_dir / 'logs'}/rollout-*.jsonl"
        )

    def _check_filtered(self, now: float) -> None:
        """Log that too many groups are filtered, and raise NothingToLearn once that has lasted watchdog.abort_s."""
        queue, limit = self._recorder.queue, self._config.rollout.filter.max_share
        if queue is None:
            return
        abort_s = self._config.watchdog.abort_s
        counts = queue.counts
        over = self._filtered.look(counts.trained + counts.failed, counts.filtered) > limit
        lasted = self._over_share.look(now, over)
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sorted(queue.filtered.items()))
        if over and not self._share_logged:
            log.warning("groups_filtered", limit=limit, abort_s=abort_s, reasons=reasons)
            self._recorder.event("groups_filtered", limit=limit, abort_s=abort_s, reasons=reasons)
        self._share_logged = over
        if over and lasted >= abort_s:
            raise NothingToLearn(
                f"more than rollout.filter.max_share = {limit:g} of the last {_FILTER_WINDOW} groups were filtered for "
                f"{lasted:.0f} s (in all {reasons}): almost no prompt teaches anything; set data.train to prompts that "
                "the policy solves sometimes, rollout.n to more, or rollout.filter to filter less"
            )

    async def _abort(self, description: str) -> NoReturn:
        await _dump_stacks([self._queue.actor, *self._rollouts.actors, *self._trainers.actors])
        raise StalledError(
            f"{description}; the stacks of every process are in {self._config.run_dir / 'logs'} "
            f"(watchdog.abort_s = {self._config.watchdog.abort_s:g})"
        )


async def _in_time(call: Awaitable[T]) -> T | None:
    """Return what an actor answers; None if it does not respond in time."""
    try:
        async with asyncio.timeout(timeouts.ANSWER_S):
            return await call
    except TimeoutError:
        return None


async def _dump_stacks(actors: Sequence[Any]) -> None:
    """Have this process, each actor's process and the engines write their stacks to logs/<role>.stacks.txt.

    A signal triggers it, so that a process that hangs writes them too.
    """
    os.kill(os.getpid(), DUMP_STACKS)
    here = ray.get_runtime_context().get_node_id()
    elsewhere: dict[str, list[int]] = {}
    for node, pid in await asyncio.to_thread(_processes, {actor._actor_id.hex() for actor in actors}):
        if node == here:
            _signal_stacks([pid])
        else:
            elsewhere.setdefault(node, []).append(pid)
    for node, pids in elsewhere.items():
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(num_cpus=0)(_signal_stacks).options(scheduling_strategy=on_node).remote(pids)
    await asyncio.sleep(_STACKS_WRITTEN_S)


def _processes(actor_ids: set[str]) -> list[tuple[str, int]]:
    """Return (node, pid) of each actor that Ray has on record."""
    table = ray._private.state.actors()
    return [
        (table[actor_id]["Address"]["NodeID"], table[actor_id]["Pid"]) for actor_id in actor_ids if actor_id in table
    ]


def _signal_stacks(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            engines = [child.pid for child in psutil.Process(pid).children() if _ENGINE in child.name()]
            for each in (pid, *engines):
                os.kill(each, DUMP_STACKS)
