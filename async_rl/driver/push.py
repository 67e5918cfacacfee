"""The weight syncs of a run: brings the trainer's weights to the replicas as the next policy version, and counts it.

``weights.sync`` is one sync; this module decides what surrounds it: which replicas take part, the evaluation and the
checkpoint that want the engines paused, and the queue's next version window. Does not know the training loop.
"""

from __future__ import annotations

import functools

from async_rl.driver.checkpoint import Checkpointer
from async_rl.driver.evaluation import Evaluator
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.driver.run_state import RunState
from async_rl.errors import ReplicaFailed
from async_rl.queue.client import QueueClient
from async_rl.runtime import logs
from async_rl.weights.sync import WeightSync


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
        """The policy version."""
        self.synced_step = step
        """The training step whose weights are those of the policy version."""
        self._attempted = version  # the last version that a weight sync was begun with
        self._queue = queue
        self._sync = sync
        self._replicas = replicas
        self._evaluator = evaluator
        self._checkpointer = checkpointer
        self._monitor = monitor
        self._recorder = recorder

    async def push(self, step: int, *, snapshot: bool = False) -> RunState | None:
        """Bring the weights of ``step`` to every replica as version v+1, and let the queue admit groups for it.

        Restarted workers take part. With ``snapshot``, returns the run's state as it is while the engines are paused.
        """
        await self._evaluator.finished(step)
        # A version whose sync was given up is not used again: engines may have sampled with other weights under it.
        version = self._attempted = max(self.version, self._attempted) + 1
        paused = functools.partial(self._checkpointer.freeze, step) if snapshot else None
        held = snapshot or self._evaluator.pauses(version)
        all_paused = None if held else functools.partial(self._open_window, version)
        with self._monitor.phase("push", step):
            while True:
                await self._replicas.add_waiting_members()
                try:
                    record = await self._sync.run(
                        version, paused=paused, all_paused=all_paused, end_calls=snapshot, held=held
                    )
                    break
                except ReplicaFailed as error:
                    self._replicas.evict(error)
        self.synced_step = step
        await self._evaluator.while_paused(version, step)
        # Before the queue admits more groups: those are not frozen.
        state = await self._checkpointer.take(step, version, synced=True) if snapshot else None
        await self._open_window(version)
        self._recorder.sync(record)
        if held:
            await self._sync.resume()
        self._replicas.on_sync_done()
        self._evaluator.beside_rollouts(version)
        return state

    async def _open_window(self, version: int) -> None:
        """Let the queue admit groups for ``version``, once: a sync that lost a replica is run again."""
        if version > self.version:
            self.version = version
            logs.bind(version=version)
            await self._queue.advance(version)
