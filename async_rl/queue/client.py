"""The queue's ends: for the driver, which hands groups in and leases them, for workers, and for who reads the groups.

Payloads never pass through the queue's process. An encoded group is stored by the worker that finished it, as a return
value of its stream (``Outbox``), so that the caller of the stream owns it: the driver, which keeps the reference until
the group has ended (``QueueClient``). So neither the death of a worker nor that of the queue loses a finished group.

Knows Ray, the codec, and the actor as a handle only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayTaskError

from async_rl.config.schema import RunConfig
from async_rl.errors import QueueError
from async_rl.metrics.records import GroupCounts
from async_rl.queue.broker import PAYLOAD_LOST
from async_rl.queue.codec import decode, encode
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.runtime.failures import user_facing_error
from async_rl.types import Group

if TYPE_CHECKING:
    from async_rl.queue.redis_store import RedisGroups

Payload = list[Any] | str
"""[ObjectRef of an encoded group]: in a list, so that Ray passes the reference on instead of the object. With
queue.backend redis, an address there."""


def open_groups(config: RunConfig, consumer: str) -> RedisGroups | None:
    """Where the messages of finished groups are, as ``consumer``; None for the object store."""
    if config.queue.backend == "memory":
        return None
    from async_rl.queue.redis_store import RedisGroups

    return RedisGroups(config.queue.redis, config.name, consumer)


class Fetcher:
    """Gets leased groups: for who trains on them, or writes them down."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._groups: RedisGroups | None = None

    def messages(self, payloads: Sequence[Payload]) -> list[Any]:
        """As they were encoded; views on the object store, where they are there."""
        stored = [payload for payload in payloads if isinstance(payload, str)]
        from_redis = iter(self._redis().read(stored) if stored else [])
        in_memory = iter(ray.get([payload[0] for payload in payloads if not isinstance(payload, str)]))
        return [next(from_redis if isinstance(payload, str) else in_memory) for payload in payloads]

    def groups(self, payloads: Sequence[Payload]) -> list[Group]:
        """Decoded; their arrays are views on the messages."""
        return [decode(message) for message in self.messages(payloads)]

    def _redis(self) -> RedisGroups:
        if self._groups is None:
            self._groups = open_groups(self._config, "reader")
        assert self._groups is not None
        return self._groups


class QueueClient:
    """A handle on the actor for workers and driver; can be sent to other processes.

    Holds the payloads of the groups that were put through it, until they have ended: who leases them must be the same
    client. Raises what the broker raised, without Ray's wrapping. Groups that are put while a call is on its way
    share the next one: a remote call costs about as much as storing a megabyte.
    """

    def __init__(self, actor: Any, groups: RedisGroups | None = None) -> None:
        """groups: where their messages are with queue.backend redis."""
        self.actor = actor
        self._groups = groups
        self._name = uuid.uuid4().hex[:16]
        self._calls = itertools.count()
        self._payloads: dict[str, Payload] = {}
        self._outbox: list[tuple[str, GroupMeta]] = []
        self._gathering: asyncio.Task[list[bool | QueueError]] | None = None
        self._sending = asyncio.Lock()

    def __reduce__(self) -> tuple[type[QueueClient], tuple[Any]]:
        return QueueClient, (self.actor,)

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        result: list[Ticket] = await self._call("take", self._id(), worker, limit)
        return result

    async def put(self, group: Group) -> GroupMeta:
        """Encode and store the group, then hand it in; returns once the queue has it."""
        meta, message = await self._encoded(group)
        await self.put_stored(meta, [ray.put(message)])
        return meta

    async def put_stored(self, meta: GroupMeta, payload: Payload) -> bool:
        """Hand in a group that is stored: as ``payload``, or at the meta's address. False if it was dropped at once."""
        if meta.address:
            payload = meta.address
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._send())
        place, batch = len(self._outbox), self._gathering
        # Before it is handed in: somebody may lease it before the answer is here.
        held = self._payloads.setdefault(meta.group_id, payload)
        self._outbox.append((self._id(), meta))
        answer = (await asyncio.shield(batch))[place]  # one caller's cancellation is not the others'
        if answer is not True:
            if held is payload:
                del self._payloads[meta.group_id]
            if self._groups is not None and isinstance(payload, str):
                await asyncio.to_thread(self._groups.forget, [payload])
        if isinstance(answer, QueueError):
            raise answer
        return answer

    def hold(self, group_id: str, payload: Payload) -> None:
        """Keep the payload of a group that the queue was started with."""
        self._payloads[group_id] = payload

    def payload(self, group_id: str) -> Payload | None:
        """Of a group that was put, and has not ended."""
        return self._payloads.get(group_id)

    async def lease(
        self, consumer: str, n: int, timeout_s: float | None = None, at_least: int | None = None
    ) -> list[tuple[GroupMeta, Payload]]:
        """What was leased, for ``fetch``; [] after ``timeout_s``."""
        metas: list[GroupMeta] = await self._call("lease", self._id(), consumer, n, timeout_s, at_least)
        for meta in metas:
            if meta.group_id not in self._payloads:
                raise QueueError(f"group {meta.group_id}: {consumer} leased it, and its payload is not here")
        if self._groups is not None and metas:
            await asyncio.to_thread(self._groups.claim, [meta.address for meta in metas])
        return [(meta, self._payloads[meta.group_id]) for meta in metas]

    async def ack(self, group_ids: Iterable[str], step: int = 0) -> None:
        ids = list(group_ids)
        await self._decide("ack", ids, step)
        await self._let_go(ids)

    async def release(self, group_ids: Iterable[str]) -> None:
        await self._let_go(await self._decide("release", list(group_ids)))

    async def return_group(self, group_id: str, reason: str) -> None:
        await self._decide("return_group", group_id, reason)
        await self._let_go([group_id])

    async def fail(self, group_id: str, reason: str) -> None:
        await self._decide("fail", group_id, reason)
        await self._let_go([group_id])

    async def worker_lost(self, worker: str, keep: Collection[str] = ()) -> list[str]:
        """What was returned: ``keep`` stays, for another worker to go on with."""
        result: list[str] = await self._call("worker_lost", self._id(), worker, list(keep))
        return result

    async def adopt(self, worker: str, group_ids: Iterable[str]) -> list[str]:
        """Those of the groups in flight that are the worker's now."""
        result: list[str] = await self._decide("adopt", worker, list(group_ids))
        return result

    async def advance(self, version: int) -> None:
        await self._let_go(await self._decide("advance", version))

    async def recover(self, step: int) -> int:
        """Take over what there is of a run that goes on after training step ``step``: in a store that outlived it, and
        what ``hold`` was given. A group whose payload is nowhere goes back to the dataset.

        Returns the newest version that sampled a token of what there is; -1 where there is nothing.
        """
        state = await self.state()
        metas = [GroupMeta.from_fields(meta) for _, meta in [*state["queued"], *state["leased"]]]
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
        return max((meta.newest_version for meta in metas), default=-1)

    async def checkpointed(self, oldest_step: int) -> None:
        await self._decide("checkpointed", oldest_step)

    async def rewind(self, step: int) -> list[str]:
        """The prompts that were trained after ``step``, and are in circulation again."""
        result: list[str] = await self._decide("rewind", step)
        return result

    async def close(self) -> None:
        await self._call("close")

    async def counts(self) -> GroupCounts:
        result: GroupCounts = await self._call("counts")
        return result

    async def stats(self) -> QueueStats:
        result: QueueStats = await self._call("stats")
        return result

    async def state(self) -> dict[str, Any]:
        result: dict[str, Any] = await self._call("state")
        return result

    async def _encoded(self, group: Group) -> tuple[GroupMeta, npt.NDArray[np.uint8]]:
        """The message is empty where it is stored at the meta's address."""
        message = encode(group)
        meta = GroupMeta.of(group, message.nbytes)
        if self._groups is None:
            return meta, message
        address = await asyncio.to_thread(self._groups.add, group.group_id, message)
        return dataclasses.replace(meta, address=address), np.empty(0, np.uint8)

    async def _send(self) -> list[bool | QueueError]:
        async with self._sending:  # while one batch is on its way, the next one gathers
            batch, self._outbox, self._gathering = self._outbox, [], None
            answers: list[bool | QueueError] = await self._call("put_many", batch)
            return answers

    async def _let_go(self, group_ids: Iterable[str]) -> None:
        payloads = [self._payloads.pop(group_id, None) for group_id in group_ids]
        stored = [payload for payload in payloads if isinstance(payload, str)]
        if self._groups is not None and stored:
            await asyncio.to_thread(self._groups.forget, stored)

    def _id(self) -> str:
        return f"{self._name}/{next(self._calls)}"

    async def _decide(self, method: str, *arguments: Any) -> Any:
        return await self._call("decide", self._id(), method, *arguments)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.actor, method).remote(*arguments)
        except RayTaskError as error:
            raise user_facing_error(error) from None


class Outbox(QueueClient):
    """The worker's end: what it has finished leaves in a stream, and is handed in by whoever reads that."""

    def __init__(self, actor: Any, groups: RedisGroups | None = None) -> None:
        super().__init__(actor, groups)
        self._ready: asyncio.Queue[tuple[GroupMeta, npt.NDArray[np.uint8]]] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def put(self, group: Group) -> GroupMeta:
        """Encode the group and have it handed in; returns once ``accepted`` was called for it."""
        meta, message = await self._encoded(group)
        accepted = self._waiting[meta.group_id] = asyncio.get_running_loop().create_future()
        self._ready.put_nowait((meta, message))
        try:
            await accepted
        finally:
            del self._waiting[meta.group_id]
        return meta

    def accepted(self, group_id: str) -> None:
        """The queue has it."""
        if (waiting := self._waiting.get(group_id)) is not None and not waiting.done():
            waiting.set_result(None)

    async def stream(self, work: Awaitable[None]) -> AsyncIterator[npt.NDArray[np.uint8] | GroupMeta]:
        """Message and meta of each group that ``work`` puts, in turn, until it ends; raises what it raises."""
        working = asyncio.ensure_future(work)
        try:
            while True:
                following = asyncio.ensure_future(self._ready.get())
                await asyncio.wait({working, following}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    working.result()
                    return
                meta, message = following.result()
                yield message
                yield meta
        finally:
            working.cancel()


async def incoming(stream: AsyncIterator[Any]) -> AsyncIterator[tuple[GroupMeta, Payload]]:
    """What a worker's ``Outbox.stream`` sends, at the other end: each group once it is here as a whole.

    Raises what ended the stream, the worker's death for one. Ray puts that in the place of the next value, so the value
    that is not looked at, the message, must not be the last one.
    """
    async for message in stream:
        meta = await anext(stream, None)
        if meta is None:
            await message  # raises
            return
        yield await meta, [message]
