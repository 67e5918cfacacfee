"""The weight syncs of a run: brings the trainer's weights to the replicas as the next policy version, and counts it.

``weights.sync`` is one sync; this module decides what surrounds it: which replicas take part, the evaluation and the
checkpoint that want the engines paused, and the queue's next version window. Does not know the training loop.

    begin ──► weights staged ──► all replicas paused ──► each loads, is checked and resumes ──► end
                                 version window opens
    training loop waits for these two                    leases, computes gradients ──► finished ──► update

So the trainer computes while engines load their weights and check them. It keeps the weights that it has pushed until
the sync is over: a sync that must be repeated sends and compares the same ones, in calls that wait in line behind the
one that computes. The training loop waits for the whole sync where the trainer takes part in it
(``WeightSync.needs_trainer``), with sync.rolling, and for a checkpoint or an evaluation of paused engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable

from async_rl.driver.checkpoint import Checkpointer, RunMoment
from async_rl.driver.evaluation import Evaluator
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.errors import ReplicaFailed, TrainerDied
from async_rl.metrics.records import SyncRecord
from async_rl.queue.client import QueueClient
from async_rl.runtime import logs
from async_rl.weights.sync import WeightSync
from async_rl.weights.sync_attempt import Paused

Then = Callable[[], Awaitable[None]]
"""Awaited when all rollouts have resumed."""


class Pusher:
    """Pushes the weights of one run, which begins or continues with ``version`` at training step ``step``."""

    def __init__(
        self,
        version: int,
        step: int,
        *,
        queue: QueueClient,
        sync: WeightSync,
        replicas: ReplicaSupervisor,
        evaluator: Evaluator,
        checkpointer: Checkpointer,
        monitor: Monitor,
        recorder: Recorder,
    ) -> None:
        self.version = version
        """The policy version: that of the trainer's weights, once a sync to it is under way."""
        self.synced_step = step
        """The training step whose weights all members have, of the last sync that is over."""
        self._attempted = version  # the last version that a weight sync was begun with
        self._pushing: asyncio.Future[RunMoment | None] | None = None
        self._queue = queue
        self._sync = sync
        self._replicas = replicas
        self._evaluator = evaluator
        self._checkpointer = checkpointer
        self._monitor = monitor
        self._recorder = recorder

    async def begin(self, step: int, *, snapshot: bool = False, then: Then | None = None) -> RunMoment | None:
        """Begin to bring the weights of ``step`` to every replica as version v+1; return once the trainer may compute.

        Restarted workers take part. With ``snapshot``, returns the run's state as it is while the engines are paused.
        """
        await self.finished(step)
        await self._evaluator.finished(step)
        # A version whose sync was given up is not used again: engines may have sampled with other weights under it.
        version = self._attempted = max(self.version, self._attempted) + 1
        with self._monitor.phase("push", step):
            window = asyncio.Event()
            self._pushing = asyncio.ensure_future(self._push(version, step, window, snapshot=snapshot, then=then))
            opened = asyncio.ensure_future(window.wait())
            try:
                await asyncio.wait([self._pushing, opened], return_when=asyncio.FIRST_COMPLETED)
            finally:
                opened.cancel()
        return await self.finished(step) if self._pushing.done() else None

    async def finished(self, step: int) -> RunMoment | None:
        """Return once no weight sync is under way, in training step ``step``. Raises what it raised."""
        pushing, state = self._pushing, None
        if pushing is not None:
            if not pushing.done():
                with self._monitor.phase("push", step):
                    await asyncio.wait([pushing])
            self._pushing = None
            state = pushing.result()
        return state

    async def push(self, step: int) -> None:
        """Bring the weights of ``step`` to every replica as version v+1."""
        await self.begin(step)
        await self.finished(step)

    async def settled(self, step: int) -> None:
        """Return once no weight sync is under way, because the trainer died. Its death may have ended the sync too."""
        with contextlib.suppress(TrainerDied):
            await self.finished(step)

    def under_way(self) -> bool:
        """Return whether a weight sync is under way. Raises what one raised that has ended."""
        if self._pushing is not None and self._pushing.done():
            self._pushing.result()
        return self._pushing is not None and not self._pushing.done()

    def cancel(self) -> None:
        """End a weight sync that is under way, because the run ends."""
        if self._pushing is not None and not self._pushing.cancel() and not self._pushing.cancelled():
            self._pushing.exception()  # it has ended by itself, and nothing asks for the reason any more

    async def _push(
        self, version: int, step: int, window: asyncio.Event, *, snapshot: bool, then: Then | None
    ) -> RunMoment | None:
        """Sync, and do what surrounds it. Sets ``window`` when the trainer may compute before the sync is over."""
        paused = functools.partial(self._checkpointer.freeze, step) if snapshot else None
        held = snapshot or self._evaluator.pauses(version, step)
        record = await self._synced(version, window, paused=paused, held=held)
        self.synced_step = step
        await self._evaluator.while_paused(version, step)
        # Before the queue admits more groups: those are not frozen.
        state = await self._checkpointer.take(step, version, synced=True) if snapshot else None
        await self._open_window(version)
        self._recorder.sync(record)
        if held:
            await self._sync.resume()
        self._replicas.on_sync_done()
        self._evaluator.beside_rollouts(version, step)
        if then is not None:
            await then()
        return state

    async def _synced(self, version: int, window: asyncio.Event, *, paused: Paused | None, held: bool) -> SyncRecord:
        """Bring every replica to ``version`` that can be; those that fail are replaced."""

        async def all_paused() -> None:
            await self._open_window(version)
            if not self._sync.needs_trainer:
                window.set()

        while True:
            await self._replicas.add_waiting_members()
            try:
                return await self._sync.run(
                    version,
                    paused=paused,
                    all_paused=None if held else all_paused,
                    end_calls=paused is not None,
                    held=held,
                )
            except ReplicaFailed as error:
                self._replicas.evict(error)

    async def _open_window(self, version: int) -> None:
        """Let the queue admit groups for ``version``, once: a sync that lost a replica is run again."""
        if version > self.version:
            self.version = version
            logs.bind(version=version)
            await self._queue.advance(version)
