"""The rollout workers at work: submits the groups that they finish to the queue, and replaces a worker that dies.

A worker is a *member* (``WeightSync.members``) while it has the current weights. Weight syncs and evaluations go to
members. A worker that was restarted, or whose replica came later than the run began, waits until the training loop
brings it to the current version, or to the next one.

Each replica has a coroutine of its own, its *life*, from the start of the run to its end. Where replicas come and go
with their hosts (``config.rollout.elastic``), it waits for a host first, and again whenever the host has left. That is
not counted as a restart (``recovery.max_restarts``). A run begins without a replica whose engine does not start, as on
a GPU that is broken, if enough others may still start: settings with which no engine starts end it.

A worker's end has one owner, its ``supervise``: whatever else finds a replica that does not respond only evicts it.
Does not know the training loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog

from async_rl.driver.actors import RolloutWorkers
from async_rl.driver.recorder import Recorder
from async_rl.driver.restarts import Recovery
from async_rl.driver.salvage import salvage
from async_rl.errors import AsyncRLError, EngineError, ReplicaFailed
from async_rl.queue.client import QueueClient
from async_rl.queue.handover import collect
from async_rl.rollout.stats import worker_id
from async_rl.runtime.failures import brief, is_object_lost, is_process_death, is_worker_lost, unwrap_ray_error
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)


class ReplicaSupervisor:
    """Keeps all replicas of a run working."""

    def __init__(
        self, rollouts: RolloutWorkers, queue: QueueClient, sync: WeightSync, recovery: Recovery, recorder: Recorder
    ) -> None:
        self._rollouts = rollouts
        self._queue = queue
        self._sync = sync
        self._recovery = recovery
        self._recorder = recorder
        self._lives: list[asyncio.Future[None]] = []
        self._failed: asyncio.Future[None]  # that of the first life that raised
        self._first: frozenset[int] = frozenset()  # replicas with which the run began
        self._unstarted: set[int] = set()  # replicas that did not start before it began
        self._begun = False
        self._sampling = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[None]] = {}  # replicas that have started, until they have weights
        self._new_waiting = asyncio.Event()
        self._evicted: dict[int, asyncio.Future[ReplicaFailed]] = {}  # read by ``supervise`` of the replica

    # -- the start of the run -----------------------------------------------------------------------------------

    def starting(self) -> dict[str, Awaitable[None]]:
        """Begin to bring up every replica. Returns waits, by name, for those with which the run begins.

        A wait raises what bringing up any replica raises.
        """
        least, most = self._recovery.fleet.replicas.min, self._recovery.fleet.replicas.max
        self._failed = asyncio.get_running_loop().create_future()
        self._lives = [asyncio.ensure_future(self._live(replica)) for replica in range(most)]
        for life in self._lives:
            life.add_done_callback(self._life_ended)
        if least < most:
            return {f"{least} of {most} rollout workers": self._until(lambda: len(self._waiting) >= least)}
        return {worker_id(each): self._until(partial(self._is_decided, each)) for each in range(most)}

    def _is_decided(self, replica: int) -> bool:
        return replica in self._waiting or replica in self._unstarted

    def begin(self) -> None:
        """Make members of the replicas that have started: their engines have loaded what the trainer begins with."""
        self._begun, self._first = True, frozenset(self._waiting)
        for replica in self._first:
            self._sync.members[replica] = self._rollouts.workers[replica]
        self.on_sync_done()

    def training(self) -> list[Awaitable[None]]:
        """Let the replicas sample. Returns what raises when one of them, or all together, cannot continue."""
        self._sampling.set()
        return [*self._lives, self._recovery.watch()]

    def close(self) -> None:
        """Bring no replica up any more, because the run ends."""
        for life in self._lives:
            life.cancel()

    def _life_ended(self, life: asyncio.Future[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # it may be that nothing waits for it

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Return once a condition on the waiting replicas holds. Raises what bringing up any replica has raised."""
        while not condition():
            self._new_waiting.clear()
            new = asyncio.ensure_future(self._new_waiting.wait())
            waited: list[asyncio.Future[Any]] = [new, self._failed]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            new.cancel()
            if self._failed.done():
                self._failed.result()

    # -- weights ------------------------------------------------------------------------------------------------

    async def admit(self, version: int) -> None:
        """Bring the workers that wait to ``version``, which the members have. No member is paused for it."""
        while self._waiting:
            replica = next(iter(self._waiting))
            self._sync.members[replica] = self._rollouts.workers[replica]
            try:
                await self._sync.join(replica, version)
            except ReplicaFailed as error:
                self.evict(error)
            else:
                self._has_weights(replica)

    def on_sync_done(self) -> None:
        """Note that a weight sync is over: restarted workers that took part have weights."""
        for replica in list(self._waiting):
            if replica in self._sync.members:
                self._has_weights(replica)

    def _has_weights(self, replica: int) -> None:
        # It waits no longer if its host has left meanwhile.
        if (joined := self._waiting.pop(replica, None)) is not None:
            joined.set_result(None)

    async def stop(self) -> None:
        """End all rollouts, because training is over. The engines can still evaluate."""
        await asyncio.gather(*(self._stop(replica) for replica in list(self._sync.members)))

    async def _stop(self, replica: int) -> None:
        try:
            await self._sync.on(replica, lambda worker: worker.stop())
        except ReplicaFailed as error:
            self.evict(error)

    # -- the life of a replica ----------------------------------------------------------------------------------

    async def _live(self, replica: int) -> None:
        """Bring a replica up, now or when it has a host, and supervise it."""
        name = worker_id(replica)
        try:
            await self._start(replica, None)
            if replica not in self._first:
                self._joined(name)
        except Exception as error:
            may_be_tried = _may_be_tried_again(error)
            if not (self._begun and may_be_tried) and not await self._rollouts.has_left(replica, error):
                if not (may_be_tried and self._begins_without(replica, error)):
                    raise
                await self._sampling.wait()
            await self._replace(replica, error, {})
        await self._sampling.wait()
        await self.supervise(replica)

    def _begins_without(self, replica: int, error: Exception) -> bool:
        """Return whether the run may begin without a replica that did not start, which is tried again once it has."""
        name, fleet = worker_id(replica), self._recovery.fleet
        others = fleet.others(name) - len(self._unstarted)
        if others < fleet.needed:
            return False
        self._rollouts.kill(replica)
        self._unstarted.add(replica)
        self._new_waiting.set()
        self._recorder.event("replica_not_started", replica=name, others=others, reason=brief(error))
        return True

    async def supervise(self, replica: int) -> None:
        """Submit the groups that a replica finishes; replace its worker when the worker or its engine dies."""
        while True:
            error, saved = await self._until_lost(replica)
            await self._replace(replica, error, saved)

    async def _until_lost(self, replica: int) -> tuple[BaseException, dict[str, Any]]:
        """Submit the groups of a replica until it is lost. Returns the reason, and its groups in flight by id."""
        worker, evicted = self._rollouts.workers[replica], self._eviction(replica)
        groups: asyncio.Future[None] = asyncio.ensure_future(collect(self._queue, worker.groups(), worker.accepted))
        saved: dict[str, Any] = {}
        try:
            waited: list[asyncio.Future[Any]] = [groups, evicted]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not groups.done() or ((error := groups.exception()) is not None and is_worker_lost(error)):
                self._sync.members.pop(replica, None)
                saved = await self._salvage(replica)
                self._rollouts.kill(replica)
            # To its end: groups that it had finished are the queue's before its successor gets the others.
            await groups
        except Exception as error:
            if not is_worker_lost(error):
                raise
            return evicted.result() if evicted.done() else error, saved
        finally:
            groups.cancel()
            self._evicted.pop(replica, None)
        # The dataset has no end, so that a worker never runs out of work.
        raise AsyncRLError(f"{worker_id(replica)} stopped before the last training step")

    def _eviction(self, replica: int) -> asyncio.Future[ReplicaFailed]:
        return self._evicted.setdefault(replica, asyncio.get_running_loop().create_future())

    async def _replace(self, replica: int, error: BaseException, saved: dict[str, Any]) -> None:
        """Start another worker, hand it the groups in flight that could be saved, and wait until it has weights."""
        name = worker_id(replica)
        while True:
            kept = await self._after_death(replica, error, saved)
            try:
                await self._start(replica, kept)
            except Exception as next_error:
                # An engine that fails to start may succeed once its predecessor has released its resources.
                if not _may_be_tried_again(next_error):
                    raise
                error = next_error
                self._rollouts.kill(replica)
            else:
                if kept is None:
                    self._joined(name)
                else:
                    self._recorder.event("worker_restarted", replica=name)
                return

    async def _after_death(self, replica: int, error: BaseException, saved: dict[str, Any]) -> dict[str, Any] | None:
        """Wait until a worker that died of ``error`` may be replaced. Returns the groups in flight for the next one.

        None if the replica has left with its host. It may come back with any other, and its prompts cannot wait for it.
        """
        name = worker_id(replica)
        lost = await self._queue.worker_lost(name, keep=list(saved))
        if not await self._rollouts.has_left(replica, error):
            await self._recovery.wait(name, error, reissued=len(lost), resumed=len(saved))
            return saved
        lost += await self._queue.worker_lost(name)
        self._rollouts.remove(replica)
        self._recovery.moved(name, "waiting")
        others = self._recovery.fleet.others(name)
        self._recorder.event("replica_left", replica=name, others=others, reissued=len(lost), reason=brief(error))
        return None

    async def _start(self, replica: int, groups: dict[str, Any] | None) -> None:
        """Start a worker once its replica has a place, hand it groups in flight, and wait until it has weights."""
        name = worker_id(replica)
        await self._rollouts.placed(replica)
        self._recovery.moved(name, "starting")
        worker = self._rollouts.replace(replica)
        await self._while_there(replica, worker.start())
        if groups is not None:
            await self.hand_over(replica, groups)
        joined = self._waiting[replica] = asyncio.get_running_loop().create_future()
        self._new_waiting.set()
        try:
            await self._while_there(replica, joined)
        except ReplicaFailed:
            self._sync.members.pop(replica, None)
            raise
        finally:
            self._waiting.pop(replica, None)
        self._recovery.moved(name, "working")

    async def _while_there(self, replica: int, call: Awaitable[None]) -> None:
        """Await a call of a worker; raise ReplicaFailed when its host has left, on which no call ends any more."""
        waited, gone = asyncio.ensure_future(call), asyncio.ensure_future(self._rollouts.until_gone(replica))
        try:
            await asyncio.wait([waited, gone], return_when=asyncio.FIRST_COMPLETED)
            if not waited.done():
                gone.result()
                raise ReplicaFailed(replica, "its host has left the cluster")
            waited.result()
        finally:
            waited.cancel()
            gone.cancel()

    def _joined(self, name: str) -> None:
        self._recorder.event("replica_joined", replica=name, working=self._recovery.fleet.counts["working"])

    async def hand_over(self, replica: int, groups: dict[str, Any]) -> list[str]:
        """Have a worker resume groups in flight once it runs. Returns the ids of those that it will resume.

        These are the groups that the queue still has as in flight and that fit the worker's settings. All others that
        the queue has as in flight on this worker are issued again.
        """
        name = worker_id(replica)
        in_flight = await self._queue.adopt(name, groups)
        try:
            fitting = await self._rollouts.workers[replica].adopt([groups[group_id] for group_id in in_flight])
        except Exception as error:
            if is_process_death(error) or not is_object_lost(error):
                raise
            # They were saved on the host of the worker that had them, and that host has died since.
            log.warning("groups_in_flight_lost", worker=name, groups=len(in_flight), reason=brief(error))
            fitting = []
        await self._queue.worker_lost(name, keep=fitting)
        return fitting

    async def _salvage(self, replica: int) -> dict[str, Any]:
        """Return the groups in flight of a worker whose engine has died; none if the worker itself is dead."""
        return await salvage(self._rollouts.workers[replica], worker_id(replica))

    def evict(self, failed: ReplicaFailed) -> None:
        """Take a replica that failed out of the members; its ``supervise`` ends and replaces it."""
        member = self._sync.members.pop(failed.replica, None)
        if (joined := self._waiting.pop(failed.replica, None)) is not None:
            joined.set_exception(failed)
        elif member is not None and not (evicted := self._eviction(failed.replica)).done():
            evicted.set_result(failed)
        log.warning("replica_evicted", replica=worker_id(failed.replica), reason=str(failed))

    async def add_waiting_members(self) -> None:
        """Make restarted workers members of the weight sync; wait until it has at least one member."""
        while True:
            for replica in self._waiting:
                self._sync.members[replica] = self._rollouts.workers[replica]
            if self._sync.members:
                return
            self._new_waiting.clear()
            await self._new_waiting.wait()


def _may_be_tried_again(error: BaseException) -> bool:
    """Return whether a worker that failed to start with this error may succeed the next time."""
    return is_worker_lost(error) or isinstance(unwrap_ray_error(error), ReplicaFailed | EngineError)
