"""The queue's client, ``QueueClient``: calls the queue for driver and workers.

Payloads never pass through the queue's process. The client of the driver keeps the reference to each encoded group
until the group has ended (trained, returned, failed). ``handover`` shows how a group gets from its worker to there,
``fetcher`` how it is read, ``copies`` how it outlives its host.

Knows Ray, the codec, and the actor's methods.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import ray
import structlog
from ray.exceptions import RayTaskError

from async_rl.config.schema import RunConfig
from async_rl.errors import QueueError
from async_rl.metrics.records import GroupCounts
from async_rl.queue.actor import QueueActor
from async_rl.queue.broker import PAYLOAD_LOST
from async_rl.queue.broker_state import PlainState
from async_rl.queue.codec import encode
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.runtime.failures import user_facing_error
from async_rl.types import Group

if TYPE_CHECKING:
    from async_rl.queue.copies import Copies
    from async_rl.queue.redis_store import RedisGroups

log = structlog.get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

Payload = list[Any] | str
"""[ObjectRef of an encoded group], in a list so that Ray passes the reference on instead of the object, and those of
its copies with queue.copies 2; with queue.backend redis, the address of the group there."""


def open_groups(config: RunConfig, consumer: str) -> RedisGroups | None:
    """Open the store of finished groups' messages as ``consumer``; None if that is Ray's object store."""
    if config.queue.backend == "memory":
        return None
    from async_rl.queue.redis_store import RedisGroups

    return RedisGroups(config.queue.redis, config.name, consumer)


class QueueClient:
    """A handle on the queue's actor, for driver and workers; can be sent to other processes.

    Holds the payloads of the groups that were put through it, until they have ended: they must be leased through the
    same client. Raises what the broker raised, without Ray's wrapping. Groups that are put while a call is on its way
    share the next one: a remote call costs about as much as storing a megabyte.
    """

    def __init__(self, actor: Any, groups: RedisGroups | None = None, copies: Copies | None = None) -> None:
        """Wrap the handle of a ``QueueActor``.

        ``groups`` is the message store with queue.backend redis, ``copies`` makes second copies
        for the driver with queue.copies 2.
        """
        self.actor = actor
        self._groups = groups
        self._copies = copies
        self._name = uuid.uuid4().hex[:16]
        self._calls = itertools.count()
        self._payloads: dict[str, Payload] = {}  # {group id: payload}
        self._outbox: list[tuple[str, GroupMeta]] = []
        self._gathering: asyncio.Task[list[bool | QueueError]] | None = None
        self._sending = asyncio.Lock()
        self._warned = False

    def __reduce__(self) -> tuple[type[QueueClient], tuple[Any]]:
        return QueueClient, (self.actor,)

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        """Return one to ``limit`` tickets as soon as there are any; [] once there will never be one again."""
        return await self._call(QueueActor.take, self._id(), worker, limit)

    async def put(self, group: Group) -> GroupMeta:
        """Encode, store and put a group; return once the queue has it."""
        meta, message = await self._encoded(group)
        await self.put_stored(meta, [ray.put(message)])
        return meta

    async def put_stored(self, meta: GroupMeta, payload: Payload) -> bool:
        """Put a group that is stored already, as ``payload`` or at the meta's address; return False if it was dropped.

        Raises UnknownGroup or DuplicateGroup when the broker does not have the group in flight.
        """
        if meta.address:
            payload = meta.address
        elif self._copies is not None and isinstance(payload, list):
            await self._copies.add(meta.group_id, payload)
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._send())
        position, batch = len(self._outbox), self._gathering
        # Kept before the call: the group may be leased before the answer is here.
        kept = self._payloads.setdefault(meta.group_id, payload)
        self._outbox.append((self._id(), meta))
        answer = (await asyncio.shield(batch))[position]  # one caller's cancellation must not cancel the others'
        if answer is not True:
            if kept is payload:
                self._forget(meta.group_id)
            if self._groups is not None and isinstance(payload, str):
                await asyncio.to_thread(self._groups.forget, [payload])
        if isinstance(answer, QueueError):
            raise answer
        return answer

    def hold(self, group_id: str, payload: Payload) -> None:
        """Keep the payload of a group that the queue was started with."""
        self._payloads[group_id] = payload

    def payload(self, group_id: str) -> Payload | None:
        """Return the payload of a group that was put and has not ended."""
        return self._payloads.get(group_id)

    async def lease(
        self, consumer: str, n: int, timeout_s: float | None = None, at_least: int | None = None
    ) -> list[tuple[GroupMeta, Payload]]:
        """Lease the up to n groups finished first, for ``Fetcher``; [] after ``timeout_s``."""
        metas = await self._call(QueueActor.lease, self._id(), consumer, n, timeout_s, at_least)
        for meta in metas:
            if meta.group_id not in self._payloads:
                raise QueueError(f"group {meta.group_id}: {consumer} leased it, but this client has no payload of it")
        if self._groups is not None and metas:
            await asyncio.to_thread(self._groups.claim, [meta.address for meta in metas])
        return [(meta, self._payloads[meta.group_id]) for meta in metas]

    async def ack(self, group_ids: Iterable[str], step: int = 0) -> None:
        """Record that training step ``step`` trained leased groups, and let their payloads go."""
        ids = list(group_ids)
        await self._call(QueueActor.ack, self._id(), ids, step)
        await self._let_go(ids)

    async def release(self, group_ids: Iterable[str]) -> None:
        """Put leased groups back at the front of the queue; the broker drops those that are stale."""
        await self._let_go(await self._call(QueueActor.release, self._id(), list(group_ids)))

    async def return_group(self, group_id: str, reason: str) -> None:
        """Give a group's prompt back to the dataset."""
        await self._call(QueueActor.return_group, self._id(), group_id, reason)
        await self._let_go([group_id])

    async def fail(self, group_id: str, reason: str) -> None:
        """Give a group's prompt up."""
        await self._call(QueueActor.fail, self._id(), group_id, reason)
        await self._let_go([group_id])

    async def filter_group(self, group_id: str, reason: str, rest_epochs: int = 0) -> None:
        """End a group in flight that would teach nothing; it has no payload yet. Its row rests for so many epochs."""
        await self._call(QueueActor.filter_group, self._id(), group_id, reason, rest_epochs)

    async def worker_lost(self, worker: str, keep: Collection[str] = ()) -> list[str]:
        """Give a lost worker's groups in flight back to the dataset, except those to ``keep``; return their ids."""
        return await self._call(QueueActor.worker_lost, self._id(), worker, list(keep))

    async def adopt(self, worker: str, group_ids: Iterable[str]) -> list[str]:
        """Give groups in flight to ``worker``; return the ids of those still in flight."""
        return await self._call(QueueActor.adopt, self._id(), worker, list(group_ids))

    async def advance(self, version: int) -> None:
        """Open the window of a new version, and let the payloads of groups dropped as stale go."""
        await self._let_go(await self._call(QueueActor.advance, self._id(), version))

    async def recover(self, step: int) -> int:
        """Take over the groups of a run that is restored to training step ``step``.

        They are in a store that outlived the run, or were given to ``hold``. A group whose payload is in neither
        returns to the dataset. Returns the newest version that sampled a token of any of them; -1 without groups.
        """
        state = await self.state()
        metas = [GroupMeta.from_fields(meta) for _, meta in [*state["queued"], *state["leased"]]]
        known = {meta.group_id for meta in metas}  # other groups were given up, because their rows are bad by now
        for group_id in self._payloads.keys() - known:
            self._forget(group_id)
        await self.release([GroupMeta.from_fields(meta).group_id for _, meta in state["leased"]])
        stored = {meta.address for meta in metas if meta.address}
        if self._groups is not None:
            stored = await asyncio.to_thread(self._groups.sweep, stored)
            await self.rewind(step)
        for meta in metas:
            if meta.address in stored and self._groups is not None:
                self._payloads[meta.group_id] = meta.address
            elif meta.group_id not in self._payloads:
                await self.return_group(meta.group_id, PAYLOAD_LOST)
        if self._copies is not None:
            await self._copies.add_all(self._payloads)
        return max((meta.newest_version for meta in metas), default=-1)

    async def checkpointed(self, oldest_step: int) -> None:
        """Forget the groups trained up to the oldest checkpoint, of training step ``oldest_step``."""
        await self._call(QueueActor.checkpointed, self._id(), oldest_step)

    async def rewind(self, step: int) -> list[str]:
        """Return all groups trained after ``step`` to the dataset; return their prompts' ids."""
        return await self._call(QueueActor.rewind, self._id(), step)

    async def close(self) -> None:
        """End every wait on the queue, now and from now on."""
        await self._call(QueueActor.close)

    async def counts(self) -> GroupCounts:
        """Return the terms of invariant 5."""
        return await self._call(QueueActor.counts)

    async def stats(self) -> QueueStats:
        """Return the queue's figures at this moment. Warn once when its groups exceed queue.max_bytes."""
        stats = await self._call(QueueActor.stats)
        if stats.held_bytes > stats.max_bytes and not self._warned:
            self._warned = True
            groups = stats.queued_groups + stats.leased_groups
            enough = math.ceil(stats.held_bytes / groups * stats.max_groups)
            log.warning("queue_bytes_exceeded", max_bytes=stats.max_bytes, groups=groups, enough=enough)
        return stats

    async def state(self) -> PlainState:
        """Return the broker's state, for a checkpoint."""
        return await self._call(QueueActor.state)

    async def _encoded(self, group: Group) -> tuple[GroupMeta, npt.NDArray[np.uint8]]:
        """Encode a group; where messages are stored in Redis, store this one and return an empty one in its place."""

        def described() -> tuple[GroupMeta, npt.NDArray[np.uint8]]:
            message = encode(group)
            return GroupMeta.of(group, message.nbytes), message

        meta, message = await asyncio.to_thread(described)
        if self._groups is None:
            return meta, message
        address = await asyncio.to_thread(self._groups.add, group.group_id, message)
        return dataclasses.replace(meta, address=address), np.empty(0, np.uint8)

    async def _send(self) -> list[bool | QueueError]:
        async with self._sending:  # while one batch is on its way, the next one gathers
            batch, self._outbox, self._gathering = self._outbox, [], None
            return await self._call(QueueActor.put_many, batch)

    async def _let_go(self, group_ids: Iterable[str]) -> None:
        payloads = [self._forget(group_id) for group_id in group_ids]
        stored = [payload for payload in payloads if isinstance(payload, str)]
        if self._groups is not None and stored:
            await asyncio.to_thread(self._groups.forget, stored)

    def _forget(self, group_id: str) -> Payload | None:
        """Keep a payload no longer; return it if there was one."""
        if self._copies is not None:
            self._copies.forget([group_id])
        return self._payloads.pop(group_id, None)

    def _id(self) -> str:
        """Return the id of a new call; Ray repeats a call with its id, so that the actor knows it again."""
        return f"{self._name}/{next(self._calls)}"

    async def _call(
        self,
        method: Callable[Concatenate[QueueActor, _P], Awaitable[_T]],
        *arguments: _P.args,
        **keywords: _P.kwargs,
    ) -> _T:
        """Call a method of the remote ``QueueActor``. Raises what it raised, without Ray's wrapping."""
        try:
            answer: _T = await getattr(self.actor, method.__name__).remote(*arguments, **keywords)
        except RayTaskError as error:
            raise user_facing_error(error) from None
        return answer
