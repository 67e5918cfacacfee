"""Checkpoints of a run: one moment of it, taken, written and restored.

A moment lies between two training steps, while the engines are paused. ``Checkpointer`` asks the queue, the replicas
and the trainer for their part of it. The files of the driver's part are ``driver.run_state``'s, the folder's integrity
is ``driver.checkpoint_folder``'s. When checkpoints are due and what follows a failure is decided by ``driver.loop``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from async_rl.config.schema import RunConfig
from async_rl.driver import checkpoint_folder, run_state
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.checkpoint_schedule import CheckpointSchedule
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.driver.run_state import RunState
from async_rl.errors import ReplicaFailed
from async_rl.queue.client import QueueClient
from async_rl.rollout.stats import worker_id
from async_rl.runtime import logs
from async_rl.weights.canary import Noise
from async_rl.weights.sync import WeightSync


class Checkpointer:
    """Takes, writes and restores the checkpoints of one run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        queue: QueueClient,
        rollouts: RolloutWorkers,
        trainers: TrainerRanks,
        sync: WeightSync,
        replicas: ReplicaSupervisor,
        monitor: Monitor,
        recorder: Recorder,
    ) -> None:
        self._keep = config.checkpoint.keep
        self._schedule = CheckpointSchedule(config.checkpoint, time.monotonic())
        self.latest_step = 0
        """The step of the checkpoint that was written or restored last; 0 before the first."""
        self._queue = queue
        self._rollouts = rollouts
        self._trainers = trainers
        self._sync = sync
        self._replicas = replicas
        self._monitor = monitor
        self._recorder = recorder

    # -- due ----------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Have a checkpoint written at the end of the current training step."""
        self._schedule.request()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint of ``step``, which has just ended, is to be written."""
        return self._schedule.due(step, time.monotonic())

    # -- taken --------------------------------------------------------------------------------------------------

    async def pause_and_take(self, step: int, version: int, *, synced: bool) -> RunState:
        """Take the run's state without a weight sync, for which the replicas are paused.

        ``synced``: whether the weights of ``step`` are those of ``version``.
        """
        in_flight: dict[str, Any] = {}
        with self._monitor.phase("checkpoint", step):
            while True:
                try:
                    await self._sync.while_paused(functools.partial(self.add_in_flight, in_flight))
                    break
                except ReplicaFailed as error:
                    self._replicas.evict(error)
        return await self.take(step, version, in_flight, synced=synced)

    async def add_in_flight(self, in_flight: dict[str, Any], replica: int) -> None:
        """Add the groups in flight of a paused replica to ``in_flight``, encoded, by id."""
        in_flight.update(await self._sync.on(replica, lambda worker: worker.snapshot()))

    async def take(self, step: int, version: int, in_flight: dict[str, Any], *, synced: bool) -> RunState:
        """Return the run's state with the queue as it is now. The payloads of queued groups are still references."""
        queue = await self._queue.state()
        payloads = {group_id: self._queue.payload(group_id) for ((group_id, *_), _) in queue["queued"]}
        return RunState(
            step=step,
            version=version,
            synced=synced,
            queue=queue,
            recorder={},
            queued={group_id: payload for group_id, payload in payloads.items() if payload is not None},
            in_flight=in_flight,
            canary=None if self._sync.canary.noise is None else asdict(self._sync.canary.noise),
        )

    # -- written ------------------------------------------------------------------------------------------------

    async def write(self, state: RunState) -> None:
        """Write a checkpoint of ``state`` and of the trainer. Generation continues meanwhile."""
        began, folder = time.monotonic(), self._recorder.checkpoints
        with self._monitor.phase("checkpoint", state.step):
            partial = await asyncio.to_thread(checkpoint_folder.begin, folder, state.step)
            await asyncio.to_thread(_write_state, partial, state, self._recorder.state())
            await self._trainers.save(partial)
            await asyncio.to_thread(checkpoint_folder.commit, partial, keep=self._keep)
        await self._queue.checkpointed(checkpoint_folder.oldest_step(folder))
        self.latest_step = state.step
        self._recorder.checkpointed(state.step, time.monotonic() - began)

    # -- restored -----------------------------------------------------------------------------------------------

    async def latest(self) -> Path | None:
        """Return the folder of the latest valid checkpoint; None if there is no checkpoint."""
        found = await asyncio.to_thread(checkpoint_folder.latest_valid, self._recorder.checkpoints)
        self.latest_step = 0 if found is None else checkpoint_folder.step_of(found)
        return found

    async def restore(self, found: Path) -> int:
        """Restore queued groups, groups in flight and weights of a run that ended; the trainer has loaded ``found``.

        Returns the policy version that every replica has now.
        """
        state = await asyncio.to_thread(run_state.read, found)
        self.latest_step = state.step
        for group_id, message in state.queued.items():
            self._queue.hold(group_id, [ray.put(np.frombuffer(message, dtype=np.uint8))])
        newest = await self._queue.recover(state.step)
        resumed = await self._adopt(state)
        stats = await self._queue.stats()
        # A queue that outlived the run may have seen versions that were synced after the checkpoint.
        seen = max(state.version, stats.version, newest)
        version = seen if state.synced and seen == state.version else seen + 1
        # The engines have loaded the checkpoint that the run began with, and the trainer another one: what the canary
        # measures now is no scale, so the run's own is restored.
        self._sync.canary.noise = None if state.canary is None else Noise(**state.canary)
        await self._sync.run(version)
        logs.bind(version=version)
        if version > stats.version:
            await self._queue.advance(version)
        await self._sync.resume()
        self._recorder.event("work_restored", step=state.step, queued=stats.queued_groups, resumed=len(resumed))
        return version

    async def _adopt(self, state: RunState) -> list[str]:
        """Spread the groups in flight over the replicas. Returns the ids of those that are resumed."""
        groups, replicas = list(state.in_flight.items()), list(self._rollouts.workers)
        shares = {replica: dict(groups[index :: len(replicas)]) for index, replica in enumerate(replicas)}
        for replica, share in shares.items():
            await self._queue.adopt(worker_id(replica), share)
        # The names of the other workers are those of the run that ended, which may have had more of them.
        for name in (await self._queue.stats()).in_flight:
            await self._queue.worker_lost(name, keep=state.in_flight)
        adopted: list[str] = []
        for replica, share in shares.items():
            adopted += await self._replicas.hand_over(replica, share)
        return adopted


def _write_state(folder: Path, state: RunState, recorder: dict[str, Any]) -> None:
    # With queue.backend redis the payloads are addresses of messages that outlive the run there.
    in_memory = {group_id: payload for group_id, payload in state.queued.items() if not isinstance(payload, str)}
    messages = dict(zip(in_memory, ray.get([reference for (reference,) in in_memory.values()]), strict=True))
    run_state.write(folder, replace(state, recorder=recorder, queued=messages))
