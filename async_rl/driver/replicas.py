"""The rollout workers at work: what they finish is handed in, and one that dies is replaced.

A worker is a *member* (``WeightSync.members``) while it has the current weights: pushes and evaluations go to members.
One that was started again waits for a push, which makes it a member; the training loop makes one as soon as it can.
Knows the queue's client, ``fleet`` and ``weights.sync``; not the training loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import structlog

from async_rl.driver.actors import RolloutWorkers
from async_rl.driver.recorder import Recorder
from async_rl.driver.restarts import Recovery
from async_rl.errors import AsyncRLError, DuplicateGroup, EngineError, ReplicaFailed, UnknownGroup
from async_rl.queue.client import QueueClient, incoming
from async_rl.rollout.stats import worker_id
from async_rl.runtime.failures import is_worker_lost, unwrap_ray_error
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

# An actor that has not handed over its groups in flight by then does not.
_ANSWER_S = 5.0


class ReplicaSupervisor:
    """All replicas of a run."""

    def __init__(
        self, rollouts: RolloutWorkers, queue: QueueClient, sync: WeightSync, recovery: Recovery, recorder: Recorder
    ) -> None:
        self._rollouts = rollouts
        self._queue = queue
        self._sync = sync
        self._recovery = recovery
        self._recorder = recorder
        self._joining: dict[int, asyncio.Future[None]] = {}
        self._somebody_joins = asyncio.Event()
        self._saved: dict[int, dict[str, Any]] = {}  # groups in flight of replicas that were left out of a push

    @property
    def push_wanted(self) -> bool:
        """Whether a new worker waits for weights."""
        return bool(self._joining)

    def pushed(self) -> None:
        """A push is over: those who waited for it have weights."""
        for replica, joined in list(self._joining.items()):
            if replica in self._sync.members:
                del self._joining[replica]
                joined.set_result(None)

    async def stop(self) -> None:
        """Training is over: end what runs. Engines can still be asked for an evaluation."""
        await asyncio.gather(*(self._stop(replica) for replica in list(self._sync.members)))

    async def _stop(self, replica: int) -> None:
        try:
            await self._sync.on(replica, "stop")
        except ReplicaFailed as error:
            await self.lose(error)

    async def tend(self, replica: int) -> None:
        """Hand in what a replica's worker finishes; put another in its place when it, or its engine, dies."""
        while True:
            try:
                await self._collect(self._rollouts.workers[replica])
            except Exception as error:
                if not is_worker_lost(error):
                    raise
                await self._replace(replica, error)
            else:
                # The dataset has no end, so a worker that stops early means groups that nobody makes.
                raise AsyncRLError("a rollout worker stopped before the last training step")

    async def _collect(self, worker: Any) -> None:
        stream = worker.groups.options(num_returns="streaming").remote()
        async for meta, payload in incoming(stream):
            try:
                await self._queue.put_stored(meta, payload)
            except (UnknownGroup, DuplicateGroup) as error:
                # The books are the queue's: whatever this group is, its prompt is somewhere else by now.
                log.warning("a group that nobody waits for", group=meta.group_id, reason=str(error))
            worker.accepted.remote(meta.group_id)

    async def _replace(self, replica: int, error: BaseException) -> None:
        """Start another worker, give it what can be saved of the groups in flight, and wait until it has weights."""
        name = worker_id(replica)
        self._sync.members.pop(replica, None)
        saved = self._saved.pop(replica, None)
        if saved is None:
            saved = await self._salvage(replica)
        while True:
            self._rollouts.kill(replica)
            lost = await self._queue.worker_lost(name, keep=list(saved))
            await self._recovery.wait(
                name, error, f"{len(lost)} of its groups are issued again, {len(saved)} are gone on with"
            )
            try:
                worker = self._rollouts.replace(replica)
                await worker.start.remote()
                await self.hand_over(replica, saved)
                joined = self._joining[replica] = asyncio.get_running_loop().create_future()
                self._somebody_joins.set()
                await joined
                self._recorder.event(f"{name} is back")
                return
            except Exception as again:
                # An engine that does not come up may do so once its predecessor has given back what it held.
                if not (is_worker_lost(again) or isinstance(unwrap_ray_error(again), ReplicaFailed | EngineError)):
                    raise
                error = again
                saved = self._saved.pop(replica, saved)

    async def hand_over(self, replica: int, groups: dict[str, Any]) -> list[str]:
        """Have a worker go on with groups in flight when it runs: those that the queue still has as such. What the
        queue has as running on it besides is issued again. The groups that are gone on with."""
        name = worker_id(replica)
        running = await self._queue.adopt(name, groups)
        fitting: list[str] = await self._rollouts.workers[replica].adopt.remote({i: groups[i] for i in running})
        await self._queue.worker_lost(name, keep=fitting)
        return fitting

    async def _salvage(self, replica: int) -> dict[str, Any]:
        """The groups in flight of a worker whose engine has died; of one that is dead itself, none."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                # Copies: what is returned belongs to the worker's process when it is large.
                saved = await self._rollouts.workers[replica].snapshot.remote()
                return {group_id: np.array(message) for group_id, message in saved.items()}
        except Exception as error:  # noqa: BLE001 - whatever it is, the groups are issued again
            log.info(
                "nothing can be saved of a worker", worker=worker_id(replica), reason=str(error).partition("\n")[0]
            )
            return {}

    async def lose(self, failed: ReplicaFailed) -> None:
        """A replica could not take part in a push: end it, so that ``tend`` puts another in its place."""
        log.warning("a replica is left out", reason=str(failed))
        if self._sync.members.pop(failed.replica, None) is not None:
            self._saved[failed.replica] = await self._salvage(failed.replica)
            self._rollouts.kill(failed.replica)
        if (joined := self._joining.pop(failed.replica, None)) is not None:
            joined.set_exception(failed)

    async def admit(self) -> None:
        """Make members of the workers that wait for weights; while there is no member at all, wait for one."""
        while True:
            for replica in self._joining:
                self._sync.members[replica] = self._rollouts.workers[replica]
            if self._sync.members:
                return
            self._somebody_joins.clear()
            await self._somebody_joins.wait()
