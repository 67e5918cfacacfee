"""The queue as a Ray actor: a thin asynchronous shell around ``Broker``, and the client that both sides use.

The broker decides, this file waits. Who waits for what:

    take     a free slot in the window             freed by: advance, return_group, fail, worker_lost
    put      room, by groups and by bytes          freed by: ack, return_group, fail, worker_lost, advance
    lease    n finished groups                     come by: put, release

``close`` ends every wait. Takers and putters are served in the order they came. Nothing polls: each change of
state wakes the first taker, the first putter and the consumer, who look again.

Payloads never pass through the actor: the client puts the encoded group into the object store, and the
reference travels inside a list, which Ray hands on without fetching what it refers to. The object lives for
as long as the broker holds the reference, and no longer than the process that put it: Ray loses what a dead
process owned, which is why ``worker_lost`` gives up on what that worker had queued.

Knows Ray, the broker and the codec; neither engine nor trainer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from async_rl.config import RunConfig
from async_rl.errors import AsyncRLError, QueueClosed, QueueError
from async_rl.metrics.summary import GroupCounts
from async_rl.queue.broker import Broker, PromptSource
from async_rl.queue.codec import decode, encode
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.queue.staleness import window_limit
from async_rl.types import Group

Payload = list[Any]
"""[ObjectRef of an encoded group]: in a list, so that Ray passes the reference on instead of the object."""

MAX_CONCURRENCY = 10_000
"""Calls that may be inside the actor at once, one per waiting worker or batch of groups. Ray's default of
1,000 could fill up with waiting calls, and then the ``ack`` that makes room would not even start."""

_T = TypeVar("_T")


def build_broker(config: RunConfig, source: PromptSource, version: int = 0) -> Broker:
    """The broker that a run's settings describe, at the policy version that the run starts from."""
    training = config.async_training
    return Broker(
        source,
        required_groups=config.required_groups,
        window_limit=window_limit(
            config.required_groups, training.staleness_threshold, training.trigger_parameter_sync_step
        ),
        max_staleness=training.max_staleness,
        on_stale=training.on_stale,
        max_groups=config.queue.max_groups,
        max_bytes=config.queue.max_bytes,
        version=version,
    )


def start_queue(config: RunConfig, source: PromptSource, version: int = 0) -> QueueClient:
    """Start the actor; its client can be sent to other actors. ``source`` moves into the actor."""
    actor_class = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY)(QueueActor)
    return QueueClient(actor_class.remote(build_broker(config, source, version)))


def fetch(payloads: Sequence[Payload]) -> list[Group]:
    """Get and decode leased groups; their arrays are views on the object store. For who trains on them."""
    messages = ray.get([reference for (reference,) in payloads])
    return [decode(message) for message in messages]


class QueueActor:
    """The shell. A plain class, so that tests drive it without Ray."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._closed = False
        self._changed = asyncio.Event()
        # First come, first served, as asyncio's locks are: one waits for the state, the rest for their turn.
        self._take_turn = asyncio.Lock()
        self._put_turn = asyncio.Lock()
        self._taking: dict[object, tuple[str, float]] = {}  # call: its worker, and since when it waits
        self._take_wait_s = 0.0

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        """One to ``limit`` tickets, as soon as the budget admits one; [] once there will never be one again.

        That is after ``close``, when the worker was declared lost, or when the dataset is exhausted and
        nothing is outstanding that could come back. Workers that wait together share what is free, so that
        the first of them does not leave the others idle.
        """
        if limit < 1:
            raise QueueError(f"worker {worker} asks for {limit} groups; it must ask for 1 at least")
        call, began = object(), time.monotonic()
        self._taking[call] = (worker, began)
        try:
            async with self._take_turn:
                return await self._until(lambda: self._try_take(call, worker, limit))
        finally:
            self._taking.pop(call, None)
            self._take_wait_s += time.monotonic() - began

    async def put(self, meta: GroupMeta, payload: Payload) -> None:
        """Hand in a finished group; waits while the queue is full by groups or by bytes."""
        async with self._put_turn:
            await self._until(lambda: self._try_put(meta, payload))

    async def put_many(self, groups: Sequence[tuple[GroupMeta, Payload]]) -> list[QueueError | None]:
        """``put`` one after the other; the error of each, so that one refusal does not hide the rest."""
        errors: list[QueueError | None] = []
        for meta, payload in groups:
            try:
                await self.put(meta, payload)
            except QueueError as error:
                errors.append(error)
            else:
                errors.append(None)
        return errors

    async def lease(
        self, consumer: str, n: int, timeout_s: float | None = None, at_least: int | None = None
    ) -> list[tuple[GroupMeta, Payload]]:
        """The n groups finished first, as soon as there are ``at_least`` so many (n by default); [] after
        ``timeout_s``.

        Raises QueueClosed where there will never be as many: after ``close``, or at the end of the dataset.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._until(lambda: self._try_lease(consumer, n, n if at_least is None else at_least))
        except TimeoutError:
            return []

    async def ack(self, group_ids: Sequence[str]) -> None:
        """A gradient was taken of these leased groups."""
        self._broker.ack(group_ids)
        self._changed.set()

    async def release(self, group_ids: Sequence[str]) -> None:
        """Leased groups go back to the front of the queue."""
        self._broker.release(group_ids)
        self._changed.set()

    async def return_group(self, group_id: str, reason: str) -> None:
        """Give a group up and its prompt back to the dataset."""
        self._broker.return_group(group_id, reason)
        self._changed.set()

    async def fail(self, group_id: str, reason: str) -> None:
        """Give a group and its prompt up."""
        self._broker.fail(group_id, reason)
        self._changed.set()

    async def worker_lost(self, worker: str) -> list[str]:
        """Return all that a dead worker had running or queued, and forget that it waits for more."""
        self._taking = {call: taker for call, taker in self._taking.items() if taker[0] != worker}
        lost = self._broker.worker_lost(worker)
        self._changed.set()
        return lost

    async def advance(self, version: int) -> None:
        """A push is done: the next window opens."""
        self._broker.advance(version)
        self._changed.set()

    async def close(self) -> None:
        """End every wait, now and from now on. What is outstanding can still be acked, returned or failed."""
        self._closed = True
        self._changed.set()

    async def counts(self) -> GroupCounts:
        return self._broker.counts()

    async def stats(self) -> QueueStats:
        now = time.monotonic()
        waiting = sum(now - began for _, began in self._taking.values())
        return dataclasses.replace(self._broker.stats(), take_wait_s=self._take_wait_s + waiting)

    async def _until(self, attempt: Callable[[], _T | None]) -> _T:
        """Repeat an attempt at every change until it gives something."""
        while (result := attempt()) is None:
            self._changed.clear()
            await self._changed.wait()
        return result

    def _try_take(self, call: object, worker: str, limit: int) -> list[Ticket] | None:
        if self._closed or call not in self._taking:
            return []
        share = math.ceil(self._broker.free_slots / len(self._taking))
        tickets = self._broker.issue(worker, min(limit, share))
        if not tickets:
            self._changed.set()  # the dataset may have turned out to be exhausted: a lease may wait in vain
        return tickets if tickets or self._broker.finished else None

    def _try_put(self, meta: GroupMeta, payload: Payload) -> bool | None:
        if self._closed:
            raise QueueClosed(f"group {meta.group_id}: the queue is closed")
        self._broker.check_put(meta)
        if self._broker.full_for(meta.nbytes):
            return None
        self._broker.put(meta, payload)
        self._changed.set()
        return True

    def _try_lease(self, consumer: str, n: int, at_least: int) -> list[tuple[GroupMeta, Payload]] | None:
        if self._closed:
            raise QueueClosed(f"{consumer}: the queue is closed")
        leased = self._broker.lease(n, consumer, at_least)
        if leased is None and self._broker.starved(at_least):
            raise QueueClosed(f"{consumer}: the dataset is exhausted, and fewer than {at_least} groups are left")
        return leased


class QueueClient:
    """A handle on the actor for workers and driver; can be sent to other processes.

    Raises what the broker raised, without Ray's wrapping. Groups that are put while a call is on its way
    share the next one: a remote call costs about as much as storing a megabyte.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._outbox: list[tuple[GroupMeta, Payload]] = []
        self._gathering: asyncio.Task[list[QueueError | None]] | None = None
        self._sending = asyncio.Lock()

    def __reduce__(self) -> tuple[type[QueueClient], tuple[Any]]:
        return QueueClient, (self.actor,)

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        result: list[Ticket] = await self._call("take", worker, limit)
        return result

    async def put(self, group: Group) -> GroupMeta:
        """Encode and store the group, then hand it in; returns once the queue has it."""
        message = encode(group)
        meta = GroupMeta.of(group, message.nbytes)
        await self.put_stored(meta, [ray.put(message)])
        return meta

    async def put_stored(self, meta: GroupMeta, payload: Payload) -> None:
        """Hand in a group that is in the object store."""
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._send())
        place, batch = len(self._outbox), self._gathering
        self._outbox.append((meta, payload))
        error = (await asyncio.shield(batch))[place]  # one caller's cancellation is not the others'
        if error is not None:
            raise error

    async def lease(
        self, consumer: str, n: int, timeout_s: float | None = None, at_least: int | None = None
    ) -> list[tuple[GroupMeta, Payload]]:
        """What was leased, for ``fetch``; [] after ``timeout_s``."""
        result: list[tuple[GroupMeta, Payload]] = await self._call("lease", consumer, n, timeout_s, at_least)
        return result

    async def ack(self, group_ids: Iterable[str]) -> None:
        await self._call("ack", list(group_ids))

    async def release(self, group_ids: Iterable[str]) -> None:
        await self._call("release", list(group_ids))

    async def return_group(self, group_id: str, reason: str) -> None:
        await self._call("return_group", group_id, reason)

    async def fail(self, group_id: str, reason: str) -> None:
        await self._call("fail", group_id, reason)

    async def worker_lost(self, worker: str) -> list[str]:
        result: list[str] = await self._call("worker_lost", worker)
        return result

    async def advance(self, version: int) -> None:
        await self._call("advance", version)

    async def close(self) -> None:
        await self._call("close")

    async def counts(self) -> GroupCounts:
        result: GroupCounts = await self._call("counts")
        return result

    async def stats(self) -> QueueStats:
        result: QueueStats = await self._call("stats")
        return result

    async def _send(self) -> list[QueueError | None]:
        async with self._sending:  # while one batch is on its way, the next one gathers
            batch, self._outbox, self._gathering = self._outbox, [], None
            errors: list[QueueError | None] = await self._call("put_many", batch)
            return errors

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.actor, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, AsyncRLError):
                raise error.cause from None
            raise
