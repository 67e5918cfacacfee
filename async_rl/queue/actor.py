"""The queue as a Ray actor: a thin asynchronous shell around ``Broker``. Its ends are ``client``'s.

The broker decides, this file waits. Who waits for what:

    take     a free slot in the window             freed by: advance, return_group, fail, worker_lost, rewind
    put      room, by groups and by bytes          freed by: ack, return_group, fail, advance
    lease    n finished groups                     come by: put, release

``close`` ends every wait. Takers and putters are served in the order they came. Nothing polls: each change of
state wakes the first taker, the first putter and the consumer, who look again.

The actor may die. Ray starts it again and makes the calls again that it had not answered. Each call has an id; the
journal has the calls that were decided, from which the new actor rebuilds the broker, and answers a call that it knows
as it was answered before. So each is made exactly once.

Knows Ray, the broker and the journal; neither engine nor trainer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from async_rl.config.schema import RunConfig
from async_rl.errors import QueueClosed, QueueError
from async_rl.metrics.records import GroupCounts
from async_rl.queue.broker import Broker, PromptSource
from async_rl.queue.client import QueueClient, open_groups
from async_rl.queue.journal import FileJournal, Journal
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.queue.staleness import window_limit
from async_rl.runtime import logs

MAX_CONCURRENCY = 10_000
"""Calls that may be inside the actor at once, one per waiting worker or batch of groups. Ray's default of
1,000 could fill up with waiting calls, and then the ``ack`` that makes room would not even start."""

_REMEMBERED = 8192
"""Answers kept for calls that are made again: more than can be on their way when the actor dies."""

_COMPACT_BYTES = 16 * 2**20
"""Of the journal: some tens of thousands of groups, read again within a second."""

_T = TypeVar("_T")
Answer = Any
"""What the broker said, in msgpack's types: groups by their ids."""


def build_broker(config: RunConfig, source: PromptSource) -> Broker:
    """The broker that a run's settings describe."""
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
        max_attempts=config.rollout.max_attempts,
        can_rewind=config.checkpoint.every > 0,
    )


def start_queue(
    config: RunConfig, source: PromptSource, *, journal: Path | None = None, state: Mapping[str, Any] | None = None
) -> QueueClient:
    """Start the actor; its client can be sent to other actors. ``source`` moves into the actor.

    journal: a file that the actor is rebuilt from when it dies, recovery.max_restarts times; without one it dies once.
    With queue.backend redis the journal is there, and the actor begins with what it says. state: of a broker, to begin
    with where no journal says otherwise.
    """
    open_journal: Callable[[], Journal] | None = None
    if config.queue.backend == "redis":
        from async_rl.queue.redis_store import RedisJournal

        open_journal = functools.partial(RedisJournal, config.queue.redis, config.name)
    elif journal is not None:
        open_journal = functools.partial(FileJournal, journal)
    broker = build_broker(config, source)
    if state is not None:
        broker.restore(state)
    restarts = {} if open_journal is None else {"max_restarts": config.recovery.max_restarts, "max_task_retries": -1}
    actor_class = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY, **restarts)(_QueueProcess)
    # The dataset is in it. Ray does not keep a large argument until the actor is started again, and complains of any
    # reference among the arguments; one that is written down keeps its object for as long as this process lives.
    actor = actor_class.remote(config, ray.cloudpickle.dumps(ray.put(broker)), open_journal)
    return QueueClient(actor, open_groups(config, "driver"))


class QueueActor:
    """The shell. A plain class, so that tests drive it without Ray.

    The first argument of each call that changes something is its id; a call with the id of an earlier one is answered
    as that was.
    """

    def __init__(self, broker: Broker, open_journal: Callable[[], Journal] | None = None) -> None:
        self._broker = broker
        self._answers: dict[str, Answer] = {}  # of the last calls, by id
        self._journal = None if open_journal is None else open_journal()
        if self._journal is not None:
            self._rebuild(self._journal)
        self._closed = False
        self._changed = asyncio.Event()
        # First come, first served, as asyncio's locks are: one waits for the state, the rest for their turn.
        self._take_turn = asyncio.Lock()
        self._put_turn = asyncio.Lock()
        self._taking: dict[str, tuple[str, float]] = {}  # call: its worker, and since when it waits
        self._take_wait_s = 0.0

    async def take(self, call: str, worker: str, limit: int) -> list[Ticket]:
        """One to ``limit`` tickets, as soon as the budget admits one; [] once there will never be one again.

        That is after ``close``, when the worker was declared lost, or when the dataset is exhausted and
        nothing is outstanding that could come back. Workers that wait together share what is free, so that
        the first of them does not leave the others idle.
        """
        if limit < 1:
            raise QueueError(f"worker {worker} asks for {limit} groups; it must ask for 1 at least")
        began = time.monotonic()
        self._taking[call] = (worker, began)
        try:
            async with self._take_turn:
                ids = await self._until(lambda: self._try_take(call, worker, limit))
        finally:
            self._taking.pop(call, None)
            self._take_wait_s += time.monotonic() - began
        return [ticket for group_id in ids if (ticket := self._broker.ticket(group_id)) is not None]

    async def put(self, call: str, meta: GroupMeta) -> bool:
        """Hand in a finished group; waits while the queue is full by groups or by bytes. False if it was dropped."""
        async with self._put_turn:
            return await self._until(lambda: self._try_put(call, meta))

    async def put_many(self, groups: Sequence[tuple[str, GroupMeta]]) -> list[bool | QueueError]:
        """``put`` one after the other; the answer or error of each, so that one refusal does not hide the rest."""
        answers: list[bool | QueueError] = []
        for call, meta in groups:
            try:
                answers.append(await self.put(call, meta))
            except QueueError as error:
                answers.append(error)
        return answers

    async def lease(
        self, call: str, consumer: str, n: int, timeout_s: float | None = None, at_least: int | None = None
    ) -> list[GroupMeta]:
        """The n groups finished first, as soon as there are ``at_least`` so many (n by default); [] after
        ``timeout_s``.

        Raises QueueClosed where there will never be as many: after ``close``, or at the end of the dataset.
        """
        try:
            async with asyncio.timeout(timeout_s):
                ids = await self._until(lambda: self._try_lease(call, consumer, n, n if at_least is None else at_least))
        except TimeoutError:
            return []
        return [meta for group_id in ids if (meta := self._broker.leased_meta(group_id)) is not None]

    async def decide(self, call: str, method: str, *arguments: Any) -> Answer:
        """Any other call of the broker that changes something: ack, release, advance, return_group, fail, adopt, ..."""
        answer = self._decide(call, method, *arguments)
        self._changed.set()
        return answer

    async def worker_lost(self, call: str, worker: str, keep: Collection[str] = ()) -> list[str]:
        """Return all that a dead worker had running but for ``keep``, and forget that it waits for more."""
        self._taking = {other: taker for other, taker in self._taking.items() if taker[0] != worker}
        lost: list[str] = await self.decide(call, "worker_lost", worker, list(keep))
        return lost

    async def close(self) -> None:
        """End every wait, now and from now on. What is outstanding can still be acked, returned or failed."""
        self._closed = True
        self._changed.set()

    async def counts(self) -> GroupCounts:
        return self._broker.counts()

    async def stats(self) -> QueueStats:
        now = time.monotonic()
        waiting = sum(now - began for _, began in self._taking.values())
        return dataclasses.replace(self._broker.stats(), take_wait_s=self._take_wait_s + waiting, pid=os.getpid())

    async def state(self) -> dict[str, Any]:
        """Of the broker, for a checkpoint."""
        return self._broker.state()

    # -- deciding ------------------------------------------------------------------------------------------------

    def _decide(self, call: str, method: str, *arguments: Any) -> Answer:
        """Have the broker decide, once per call id, and write it down."""
        if call in self._answers:
            return self._answers[call]
        answer = self._ask(method, arguments)
        if method == "issue" and not answer:
            return answer  # nothing was decided: a prompt may come back, and the call waits for it
        if self._journal is not None:
            plain = [list(dataclasses.astuple(a)) if isinstance(a, GroupMeta) else a for a in arguments]
            self._journal.append([call, method, plain])
            if self._journal.size() > _COMPACT_BYTES:
                self._remember(call, answer)
                self._journal.compact(["", "restore", [self._broker.state(), list(self._answers.items())]])
        self._remember(call, answer)
        return answer

    def _ask(self, method: str, arguments: Sequence[Any]) -> Answer:
        value = getattr(self._broker, method)(*arguments)
        if method in ("issue", "lease"):
            return [item.group_id for item in value]
        return value

    def _remember(self, call: str, answer: Answer) -> None:
        self._answers[call] = answer
        while len(self._answers) > _REMEMBERED:
            del self._answers[next(iter(self._answers))]

    def _rebuild(self, journal: Journal) -> None:
        empty = True
        for call, method, arguments in journal.replay():
            empty = False
            if call in self._answers:
                continue  # written twice, when the first answer was lost
            if method == "restore":
                state, answers = arguments
                self._broker.restore(state)
                self._answers = dict(answers)
            else:
                if method == "put":
                    arguments = [GroupMeta.from_fields(arguments[0])]
                self._remember(call, self._ask(method, arguments))
        if empty:  # what the broker begins with is not in the calls
            journal.compact(["", "restore", [self._broker.state(), []]])

    async def _until(self, attempt: Callable[[], _T | None]) -> _T:
        """Repeat an attempt at every change until it gives something."""
        while (result := attempt()) is None:
            self._changed.clear()
            await self._changed.wait()
        return result

    def _try_take(self, call: str, worker: str, limit: int) -> list[str] | None:
        if call in self._answers:
            answered: list[str] = self._answers[call]
            return answered
        if self._closed or call not in self._taking:
            return []
        share = math.ceil(self._broker.free_slots / len(self._taking))
        room = min(limit, share)
        if room == 0:
            return [] if self._broker.finished else None
        tickets: list[str] = self._decide(call, "issue", worker, room)
        if not tickets:
            self._changed.set()  # the dataset has turned out to be exhausted: a lease may wait in vain
        return tickets if tickets or self._broker.finished else None

    def _try_put(self, call: str, meta: GroupMeta) -> bool | None:
        if call not in self._answers:
            if self._closed:
                raise QueueClosed(f"group {meta.group_id}: the queue is closed")
            self._broker.check_put(meta)
            if self._broker.full_for(meta.nbytes):
                return None
        kept: bool = self._decide(call, "put", meta)
        self._changed.set()
        return kept

    def _try_lease(self, call: str, consumer: str, n: int, at_least: int) -> list[str] | None:
        if call not in self._answers:
            if self._closed:
                raise QueueClosed(f"{consumer}: the queue is closed")
            if not self._broker.can_lease(n, consumer, at_least):
                if self._broker.starved(at_least):
                    raise QueueClosed(
                        f"{consumer}: the dataset is exhausted, and fewer than {at_least} groups are left"
                    )
                return None
        leased: list[str] = self._decide(call, "lease", n, consumer, at_least)
        return leased


class _QueueProcess(QueueActor):
    """QueueActor in a process of its own."""

    def __init__(self, config: RunConfig, broker: bytes, open_journal: Callable[[], Journal] | None) -> None:
        logs.configure(config.run_dir if config.run_dir.is_dir() else None, "queue", console=False)
        super().__init__(ray.get(ray.cloudpickle.loads(broker)), open_journal)
