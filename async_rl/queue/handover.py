"""How a finished group changes owner: from the rollout worker to the driver, and from there to the queue.

    worker   ``Outbox.put``      encodes the group, and waits until it is accepted
             ``Outbox.stream``   yields message and metadata as return values of a streaming call of the driver
    driver   ``incoming``        pairs message and metadata; the driver owns the message from here on, unread
             ``collect``         puts each group into the queue, then tells the worker that it is accepted
    queue    ``QueueClient``     keeps the reference until the group has ended; the queue's process sees metadata only

A return value of a stream belongs to the caller of the stream. So neither the death of a worker nor the death of the
queue loses a finished group: the driver has it as soon as the worker has let go of it.

Knows Ray's streams and the queue's client; only the driver knows replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.errors import DuplicateGroup, UnknownGroup
from async_rl.queue.client import Payload, QueueClient
from async_rl.queue.records import GroupMeta
from async_rl.types import Group

if TYPE_CHECKING:
    from async_rl.queue.redis_store import RedisGroups

log = structlog.get_logger(__name__)

# A message of some megabytes takes about so long to be written.
_POLL_S = 0.001
# Groups of one worker that are encoded and not accepted: one for the queue to decide on, one to follow it. The others
# wait as they are, and their number is bounded by the worker. Messages that wait for a full queue would be outside of
# queue.max_bytes, and would fill the object store.
_ON_THEIR_WAY = 2


class Outbox(QueueClient):
    """The worker's client of the queue, whose finished groups leave in a stream that the driver reads."""

    def __init__(self, actor: Any, groups: RedisGroups | None = None) -> None:
        """Wrap the handle of a ``QueueActor``; ``groups`` is the message store with queue.backend redis."""
        super().__init__(actor, groups)
        self._ready: asyncio.Queue[tuple[GroupMeta, npt.NDArray[np.uint8]]] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[None]] = {}  # {group id: set once it is accepted}
        self._places = asyncio.Semaphore(_ON_THEIR_WAY)

    async def put(self, group: Group) -> GroupMeta:
        """Encode the group and add it to the stream; return once ``accepted`` was called for it.

        Waits while other groups are on their way, so that a full queue stops the worker.
        """
        async with self._places:
            meta, message = await self._encoded(group)
            accepted = self._waiting[meta.group_id] = asyncio.get_running_loop().create_future()
            self._ready.put_nowait((meta, message))
            try:
                await accepted
            finally:
                del self._waiting[meta.group_id]
        return meta

    def accepted(self, group_id: str) -> None:
        """Let ``put`` of this group return: the queue has decided what becomes of it."""
        if (waiting := self._waiting.get(group_id)) is not None and not waiting.done():
            waiting.set_result(None)

    async def return_group(self, group_id: str, reason: str) -> None:
        """Give a group's prompt back to the dataset, unless the queue has the group no more, see ``collect``."""
        with _unless_discarded(group_id):
            await super().return_group(group_id, reason)

    async def fail(self, group_id: str, reason: str) -> None:
        """Give a group's prompt up, unless the queue has the group no more."""
        with _unless_discarded(group_id):
            await super().fail(group_id, reason)

    async def filter_group(self, group_id: str, reason: str, rest_epochs: int = 0) -> None:
        """End a group in flight that would teach nothing, unless the queue has it no more."""
        with _unless_discarded(group_id):
            await super().filter_group(group_id, reason, rest_epochs)

    async def stream(self, work: Awaitable[None]) -> AsyncIterator[npt.NDArray[np.uint8] | GroupMeta | None]:
        """Yield an announcement, the message and the metadata of each group that ``work`` puts, until it ends.

        Raises its error.
        """
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
                yield None
                yield message
                yield meta
        finally:
            working.cancel()


async def incoming(stream: AsyncIterator[Any]) -> AsyncIterator[tuple[GroupMeta, Payload]]:
    """Yield the groups of a worker's ``Outbox.stream`` on the driver, each once its metadata is here.

    Raises what ended the stream, for example the worker's death. Ray puts that error in the place of the next value.
    The message is passed on without being read, so it must not be the last value: the error could go unseen.
    """
    async for announcement in stream:
        await announcement
        message = await next_unread(stream)
        meta = await anext(stream, None)
        if meta is None:
            await message  # raises
            return
        yield await meta, [message]


async def next_unread(stream: Any) -> Any:
    """Return the next reference of a stream of Ray once its value exists, wherever that is; None at the stream's end.

    ``anext`` brings the value to this host in order to wait for it. This asks, so call it when the value is due.
    """
    while not stream.next_ready():
        if stream.is_finished():
            return None
        await asyncio.sleep(_POLL_S)
    return next(stream, None)


async def collect(queue: QueueClient, stream: AsyncIterator[Any], accepted: Callable[[str], object]) -> None:
    """Put every group of a worker's stream into the queue, and call ``accepted`` with its id; return when it ends.

    Raises what ended the stream, for example the worker's death.
    """
    async for meta, payload in incoming(stream):
        with _unless_discarded(meta.group_id):
            await queue.put_stored(meta, payload)
        accepted(meta.group_id)


@contextlib.contextmanager
def _unless_discarded(group_id: str) -> Iterator[None]:
    """Log it when the queue has this group no more: the worker was taken for lost, and its successor has the prompt.

    The queue owns the books. A worker that is late must not end the run.
    """
    try:
        yield
    except (UnknownGroup, DuplicateGroup) as error:
        log.warning("untracked_group_discarded", group=group_id, reason=str(error))
