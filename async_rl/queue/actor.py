"""The queue's actor: a thin asynchronous shell around ``Broker``. ``start`` makes a Ray actor of it.

The broker decides, this file waits. Who waits for what:

    take     a free slot in the window             freed by: advance, return_group, fail, filter_group, worker_lost,
                                                             rewind
    put      room, by groups and by bytes          freed by: ack, return_group, fail, advance
    lease    n finished groups                     supplied by: put, release

``close`` ends every wait. Takers and putters are served in the order they came. Nothing polls: each change of
state wakes the first taker, the first putter and the consumer, which then try again.

The actor may die. Ray then restarts it and repeats the calls that it had not answered. Each call has an id. The
journal holds the calls that were decided: the new actor rebuilds the broker from them, and answers a call that it finds
there as it was answered before. So each call takes effect exactly once. The first actor finds a journal too, which
``begin`` wrote; an actor without one refuses to start, since it cannot know what was issued before it.

A worker that was declared lost may be alive behind a broken network, and come back beside its successor, which has its
name. Its client gets no more tickets, because the groups that it makes of them would not be read. The client is known
by the ids of its calls, which begin with a name of its own.

Knows the broker and the journal; neither Ray nor engine nor trainer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, TypeVarTuple

from async_rl.errors import QueueClosed, QueueError
from async_rl.metrics.records import GroupCounts
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import PlainState
from async_rl.queue.journal import Event, Journal
from async_rl.queue.records import GroupMeta, QueueStats, Ticket

_REMEMBERED = 8192
"""Answers kept for repeated calls: more than can be unanswered when the actor dies."""

_FENCED = 1024
"""Clients of lost workers that are remembered: more than there are restarts while a network is broken."""

_COMPACT_BYTES = 16 * 2**20
"""Size below which the journal is not compacted: some tens of thousands of groups, replayed within a second.

Where the state alone is about as large or larger, the journal may grow to twice what a compaction left. So each byte of
the state that is written again stands for a byte of decisions."""

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")
Answer = Any
"""What the broker answered, in msgpack's types: tickets and groups by their ids."""


class QueueActor:
    """The shell. A plain class, so that tests drive it without Ray.

    The first argument of each call that changes something is its id. A call with the id of an earlier one gets the
    answer of the earlier one.
    """

    def __init__(self, broker: Broker, open_journal: Callable[[], Journal] | None = None) -> None:
        """Take over the broker, and bring it to the state that the journal holds.

        Raises QueueError when the journal is missing, empty or damaged.
        """
        self._broker = broker
        self._answers: dict[str, Answer] = {}  # of the last calls, by call id
        self._takers: dict[str, str] = {}  # {client: the worker that it has taken tickets for}
        self._fenced: dict[str, None] = {}  # clients of lost workers
        self._journal = None if open_journal is None else open_journal()
        self._journal_fault: Exception | None = None
        self._compact_at = _COMPACT_BYTES
        if self._journal is not None:
            self._rebuild(self._journal)
        outdated = broker.use_current_rules()
        # Replayed, the calls from now on must not be decided by earlier rules. And how much of a long journal is the
        # state shows only once it is compacted.
        if self._journal is not None and (outdated or self._journal.size() > _COMPACT_BYTES):
            self._compact(self._journal)
        self._closed = False
        self._changed = asyncio.Event()
        # asyncio's locks are fair: one caller waits for the state, the rest for their turn.
        self._take_turn = asyncio.Lock()
        self._put_turn = asyncio.Lock()
        self._taking: dict[str, tuple[str, float]] = {}  # {call: (worker, when its wait began)}
        self._take_wait_s = 0.0

    # -- calls that wait -----------------------------------------------------------------------------------------

    async def take(self, call: str, worker: str, limit: int) -> list[Ticket]:
        """Return one to ``limit`` tickets, as soon as the budget admits one; [] once there will never be one again.

        That is after ``close``, when the worker was declared lost, or when the dataset is exhausted and
        nothing is outstanding that could come back. Workers that wait at the same time share what is free, so that
        the first of them does not leave the others idle.
        """
        if limit < 1:
            raise QueueError(f"worker {worker} asks for {limit} groups; it must ask for at least 1")
        if call not in self._answers and _client(call) in self._fenced:
            return []
        began = time.monotonic()
        self._takers[_client(call)] = worker
        self._taking[call] = (worker, began)
        try:
            async with self._take_turn:
                ids = await self._until(lambda: self._try_take(call, worker, limit))
        finally:
            self._taking.pop(call, None)
            self._take_wait_s += time.monotonic() - began
        return [ticket for group_id in ids if (ticket := self._broker.ticket(group_id)) is not None]

    async def put(self, call: str, meta: GroupMeta) -> bool:
        """Queue a finished group; wait while the queue is full by groups or bytes. Return False if it was dropped."""
        async with self._put_turn:
            return await self._until(lambda: self._try_put(call, meta))

    async def put_many(self, groups: Sequence[tuple[str, GroupMeta]]) -> list[bool | QueueError]:
        """Put groups one after the other; return the answer or error of each, so that one refusal hides no answer."""
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
        """Lease the up to n groups finished first, once ``at_least`` (n by default) are queued; [] after ``timeout_s``.

        Raises QueueClosed when there will never be as many: after ``close``, or at the end of the dataset.
        """
        try:
            async with asyncio.timeout(timeout_s):
                ids = await self._until(lambda: self._try_lease(call, consumer, n, n if at_least is None else at_least))
        except TimeoutError:
            return []
        return [meta for group_id in ids if (meta := self._broker.leased_meta(group_id)) is not None]

    # -- calls that are answered at once; see Broker -------------------------------------------------------------

    async def ack(self, call: str, group_ids: list[str], step: int) -> None:
        """Record that training step ``step`` trained leased groups."""
        self._decide_and_wake(call, self._broker.ack, group_ids, step)

    async def release(self, call: str, group_ids: list[str]) -> list[str]:
        """Put leased groups back at the front of the queue; return the ids dropped as stale."""
        dropped: list[str] = self._decide_and_wake(call, self._broker.release, group_ids)
        return dropped

    async def advance(self, call: str, version: int) -> list[str]:
        """Open the window of a new version; return the ids of queued groups dropped as stale."""
        dropped: list[str] = self._decide_and_wake(call, self._broker.advance, version)
        return dropped

    async def return_group(self, call: str, group_id: str, reason: str) -> None:
        """Give a group's prompt back to the dataset."""
        self._decide_and_wake(call, self._broker.return_group, group_id, reason)

    async def fail(self, call: str, group_id: str, reason: str) -> None:
        """Give a group's prompt up."""
        self._decide_and_wake(call, self._broker.fail, group_id, reason)

    async def filter_group(self, call: str, group_id: str, reason: str, rest_epochs: int = 0) -> None:
        """End a group in flight that would teach nothing, and pass over its row for so many epochs."""
        self._decide_and_wake(call, self._broker.filter_group, group_id, reason, rest_epochs)

    async def adopt(self, call: str, worker: str, group_ids: list[str]) -> list[str]:
        """Give groups in flight to another worker; return the ids of those still in flight."""
        adopted: list[str] = self._decide_and_wake(call, self._broker.adopt, worker, group_ids)
        return adopted

    async def worker_lost(self, call: str, worker: str, keep: Collection[str] = ()) -> list[str]:
        """Return a lost worker's groups in flight except ``keep``; return their ids. It gets no more tickets."""
        self._taking = {other: taker for other, taker in self._taking.items() if taker[0] != worker}
        if call not in self._answers:
            self._fence(worker)
        lost: list[str] = self._decide_and_wake(call, self._broker.worker_lost, worker, list(keep))
        return lost

    async def checkpointed(self, call: str, oldest_step: int) -> None:
        """Forget the groups trained up to the oldest checkpoint."""
        self._decide_and_wake(call, self._broker.checkpointed, oldest_step)

    async def rewind(self, call: str, step: int) -> list[str]:
        """Return all groups trained after ``step`` to the dataset; return their prompts' ids."""
        lost: list[str] = self._decide_and_wake(call, self._broker.rewind, step)
        return lost

    async def close(self) -> None:
        """End every wait, now and from now on. Outstanding groups can still be acked, returned, failed or filtered."""
        self._closed = True
        self._changed.set()

    async def counts(self) -> GroupCounts:
        """Return the terms of invariant 5."""
        return self._broker.counts()

    async def stats(self) -> QueueStats:
        """Return the figures of this moment, the seconds that workers waited among them."""
        now = time.monotonic()
        waiting = sum(now - began for _, began in self._taking.values())
        return dataclasses.replace(self._broker.stats(), take_wait_s=self._take_wait_s + waiting, pid=os.getpid())

    async def state(self) -> PlainState:
        """Return the broker's state, for a checkpoint."""
        return self._broker.state()

    # -- lost workers that come back -----------------------------------------------------------------------------

    def _fence(self, worker: str) -> None:
        """Give no more tickets to the clients that have taken some for a worker until now."""
        lost = [client for client, name in self._takers.items() if name == worker]
        for client in lost:
            del self._takers[client]
            self._fenced[client] = None
        while len(self._fenced) > _FENCED:
            del self._fenced[next(iter(self._fenced))]

    # -- deciding ------------------------------------------------------------------------------------------------

    def _decide_and_wake(self, call: str, decide: Callable[[*_Arguments], object], *arguments: *_Arguments) -> Answer:
        answer = self._decide(call, decide, *arguments)
        self._changed.set()
        return answer

    def _decide(self, call: str, decide: Callable[[*_Arguments], object], *arguments: *_Arguments) -> Answer:
        """Make a decision of the broker, once per call id, and write it to the journal."""
        if call in self._answers:
            return self._answers[call]
        if self._journal_fault is not None:
            raise QueueError(f"the queue lost a decision, and makes no more: {self._journal_fault}")
        method, answer = decide.__name__, _plain_answer(decide(*arguments))
        if method == "issue" and not answer:
            return answer  # nothing was decided: a prompt may come back, and the call waits for it
        if self._journal is not None:
            plain = [a.to_fields() if isinstance(a, GroupMeta) else a for a in arguments]
            self._write(self._journal, [call, method, plain])
        self._remember(call, answer)
        if self._journal is not None and self._journal.size() > self._compact_at:
            self._compact(self._journal)
        return answer

    def _write(self, journal: Journal, event: Event) -> None:
        """Write a decision down; after a failure, the last one.

        The broker has decided by now, and cannot take it back. Decisions after it would be replayed without it.
        """
        try:
            journal.append(event)
        except Exception as error:
            self._journal_fault = error
            raise

    def _remember(self, call: str, answer: Answer) -> None:
        self._answers[call] = answer
        while len(self._answers) > _REMEMBERED:
            del self._answers[next(iter(self._answers))]

    def _rebuild(self, journal: Journal) -> None:
        """Replay the journal. It names the broker's methods: their names are a file format, and stay as they are."""
        broker = self._broker
        decisions: dict[str, Callable[..., object]] = {
            "issue": broker.issue,
            "put": lambda fields: broker.put(GroupMeta.from_fields(fields)),
            "lease": broker.lease,
            "ack": broker.ack,
            "release": broker.release,
            "advance": broker.advance,
            "return_group": broker.return_group,
            "fail": broker.fail,
            "filter_group": broker.filter_group,
            "adopt": broker.adopt,
            "worker_lost": broker.worker_lost,
            "checkpointed": broker.checkpointed,
            "rewind": broker.rewind,
        }
        empty = True
        for call, method, arguments in journal.replay():
            empty = False
            if call in self._answers:
                continue  # written twice, when the first answer was lost
            if method == "restore":
                state, answers, *clients = arguments
                broker.restore(state)
                self._answers = dict(answers)
                for takers, fenced in clients:  # since 0.2
                    self._takers, self._fenced = dict(takers), dict.fromkeys(fenced)
            else:
                if method == "issue":
                    self._takers[_client(call)] = arguments[0]
                elif method == "worker_lost":
                    self._fence(arguments[0])
                self._remember(call, _plain_answer(decisions[method](*arguments)))
        if empty:
            raise QueueError(
                f"{journal}: the queue's journal is empty, so the queue cannot be rebuilt; continue the run from its "
                "last checkpoint with --resume auto"
            )

    def _compact(self, journal: Journal) -> None:
        """Replace the journal's events by the state that they led to, and decide when to do so again."""
        clients = [list(self._takers.items()), list(self._fenced)]
        journal.compact(_restore_event(self._broker, self._answers, clients))
        self._compact_at = max(_COMPACT_BYTES, 2 * journal.size())

    async def _until(self, attempt: Callable[[], _T | None]) -> _T:
        """Repeat an attempt at every change until it returns a result."""
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
        tickets: list[str] = self._decide(call, self._broker.issue, worker, room)
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
        kept: bool = self._decide_and_wake(call, self._broker.put, meta)
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
        leased: list[str] = self._decide(call, self._broker.lease, n, consumer, at_least)
        return leased


def begin(journal: Journal, broker: Broker) -> None:
    """Write the state that the broker starts with as the journal's first event, unless the journal has events."""
    if next(journal.replay(), None) is None:
        journal.compact(_restore_event(broker, {}, [[], []]))


def _restore_event(broker: Broker, answers: Mapping[str, Answer], clients: list[Any]) -> Event:
    """Return the event that stands for all before it.

    It has the broker's state, the answers to repeated calls, and the workers' clients, those that may take and those
    that may not.
    """
    return ["", "restore", [broker.state(), list(answers.items()), clients]]


def _client(call: str) -> str:
    """Return the name of the client that made a call."""
    return call.partition("/")[0]


def _plain_answer(answer: object) -> Answer:
    """Return a decision's answer as the journal keeps it: tickets and groups by their ids."""
    if isinstance(answer, list):
        return [item.group_id if isinstance(item, Ticket | GroupMeta) else item for item in answer]
    return answer
