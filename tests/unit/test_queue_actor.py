"""The queue's actor without Ray: who waits for what, and what wakes them."""

import asyncio
import contextlib
import itertools
import types

import pytest
import structlog

from async_rl.errors import QueueClosed, UnknownGroup
from async_rl.metrics.events import in_words
from async_rl.queue import actor as actor_module
from async_rl.queue.actor import QueueActor
from async_rl.queue.client import QueueClient
from async_rl.queue.handover import Outbox
from async_rl.queue.records import GroupMeta
from tests.support.queue_parts import Source, make_broker, meta


def make_actor(rows=1000, **settings):
    return Called(QueueActor(make_broker(Source(rows), **settings)))


class Called:
    """An actor whose calls get their ids here, as a client gives them."""

    def __init__(self, actor):
        self.actor, self.ids = actor, itertools.count()

    def __getattr__(self, method):
        def call(*arguments, **keywords):
            if method in ("close", "stats", "counts"):
                return getattr(self.actor, method)()
            if method == "ack":
                arguments = (*arguments, 0)
            return getattr(self.actor, method)(str(next(self.ids)), *arguments, **keywords)

        return call


async def settle():
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def waiting(*calls):
    """Start calls that must have to wait."""
    tasks = [asyncio.create_task(call) for call in calls]
    await settle()
    assert not any(task.done() for task in tasks)
    try:
        yield tasks
        await settle()
    finally:
        for task in tasks:
            task.cancel()


async def test_take_waits_for_the_window_and_is_woken_by_each_thing_that_opens_it():
    actor = make_actor(window_limit=2)
    a, b = await actor.take("w", 9)
    async with waiting(actor.take("w", 9)) as (take,):
        await actor.return_group(a.group_id, "interrupted")
    assert [t.group_id for t in take.result()] == ["0-1.1"]
    async with waiting(actor.take("w", 9)) as (take,):
        await actor.fail(b.group_id, "reward")
    assert len(take.result()) == 1
    async with waiting(actor.take("v", 9)) as (take,):
        await actor.worker_lost("w")
    assert len(take.result()) == 2
    for ticket in take.result():
        await actor.put(meta(ticket))
    leased = await actor.lease("t", 2)
    async with waiting(actor.take("w", 9)) as (take,):
        await actor.ack([group.group_id for group in leased])
        await settle()
        assert not take.done()  # trained groups keep their place until the push
        await actor.advance(1)
    assert [t.version for t in take.result()] == [1, 1]


async def test_takers_that_wait_together_share_the_window():
    actor = make_actor(window_limit=4)
    first = await actor.take("w", 9)
    async with waiting(actor.take("a", 9), actor.take("b", 9), actor.take("c", 1)) as takes:
        for ticket in first:
            await actor.fail(ticket.group_id, "x")
    assert [len(take.result()) for take in takes] == [2, 1, 1]


async def test_a_push_that_opens_the_window_is_shared_evenly():
    actor = make_actor(window_limit=4)
    for ticket in await actor.take("w", 4):
        await actor.put(meta(ticket))
    leased = await actor.lease("t", 4)
    await actor.ack([group.group_id for group in leased])
    async with waiting(actor.take("a", 9), actor.take("b", 9)) as takes:
        await actor.advance(1)
    assert [len(take.result()) for take in takes] == [2, 2]


async def test_invariant_6_put_waits_for_room_by_groups():
    actor = make_actor(window_limit=4, max_groups=2)
    tickets = await actor.take("w", 4)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket))
    async with waiting(actor.put(meta(tickets[2])), actor.put(meta(tickets[3]))) as puts:
        leased = await actor.lease("t", 2)
        await settle()
        assert not puts[0].done()  # leased payloads are alive, and count
        await actor.ack([leased[0].group_id])
        await settle()
        assert [put.done() for put in puts] == [True, False]  # first come, first served
        await actor.ack([leased[1].group_id])
    assert puts[1].done()


async def test_invariant_6_put_waits_for_room_by_bytes():
    actor = make_actor(max_bytes=100)
    tickets = await actor.take("w", 4)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket, 40))
    async with waiting(actor.put(meta(tickets[2], 50))) as (put,):
        leased = await actor.lease("t", 2)
        assert (await actor.stats()).held_bytes == 80
        await actor.ack([group.group_id for group in leased])
    assert put.done()
    assert (await actor.stats()).held_bytes == 50


async def test_a_small_group_does_not_overtake_a_large_one_that_waits():
    actor = make_actor(max_bytes=100)
    tickets = await actor.take("w", 4)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket, 40))
    async with waiting(actor.put(meta(tickets[2], 50)), actor.put(meta(tickets[3], 10))):
        assert (await actor.stats()).held_bytes == 80  # there is room for the small one, but not its turn


async def test_responses_that_outgrow_the_bound_fill_one_training_step_and_no_more():
    actor = make_actor(max_bytes=100, required_groups=2)
    tickets = await actor.take("w", 4)
    await actor.put(meta(tickets[0], 101))
    await actor.put(meta(tickets[1], 101))
    async with waiting(actor.put(meta(tickets[2], 101))) as (put,):
        leased = await actor.lease("t", 2)
        await settle()
        assert not put.done()
        await actor.ack([group.group_id for group in leased])
    assert put.done()


class Handle:
    """What Ray's handle of an actor offers, without Ray."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, method):
        return types.SimpleNamespace(remote=getattr(self.actor, method))


async def test_groups_beyond_the_bound_are_one_warning_that_names_what_would_be_enough():
    actor = make_actor(window_limit=8, max_bytes=100, required_groups=2)
    client = QueueClient(Handle(actor.actor))
    tickets = await actor.take("w", 4)
    with structlog.testing.capture_logs() as logs:
        await actor.put(meta(tickets[0], 90))
        await client.stats()
        assert logs == []
        await actor.put(meta(tickets[1], 60))
        await client.stats()
        await client.stats()
    (warning,) = logs
    expected = {"event": "queue_bytes_exceeded", "log_level": "warning", "max_bytes": 100, "groups": 2, "enough": 600}
    assert warning == expected  # eight groups of 75 bytes
    words = in_words(warning.pop("event"), warning)
    assert words.startswith("queue.max_bytes is 100, less than 2 groups of a training step have")
    assert "set it to 600" in words


async def test_a_group_returned_while_its_put_waits_is_refused():
    actor = make_actor(max_groups=2)
    tickets = await actor.take("w", 3)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket))
    async with waiting(actor.put(meta(tickets[2]))) as (put,):
        await actor.return_group(tickets[2].group_id, "interrupted")
    assert isinstance(put.exception(), UnknownGroup)


async def test_a_filtered_group_makes_room_for_a_taker_that_waits():
    actor = make_actor(window_limit=2)
    first, _ = await actor.take("w", 2)
    async with waiting(actor.take("w", 2)) as (more,):
        await actor.filter_group(first.group_id, "zero_variance")
    assert [ticket.group_id for ticket in more.result()] == ["0-3.0"]


@pytest.mark.parametrize("end", ["filter_group", "fail", "return_group"])
async def test_a_worker_that_was_taken_for_lost_lives_on_when_its_successor_has_ended_its_group(end):
    actor = make_actor()
    lost = Outbox(Handle(actor.actor))
    trained, filtered, own = [ticket.group_id for ticket in await lost.take("w", 3)]
    assert await actor.adopt("w", [trained, filtered]) == [trained, filtered]
    await actor.filter_group(filtered, "zero_variance")
    await actor.put(GroupMeta(trained, 9, 10, 0, 0, 8, 0))
    await actor.lease("trainer", 1)
    await actor.ack([trained])
    for group_id in (trained, filtered, own):
        await getattr(lost, end)(group_id, "zero_variance" if end == "filter_group" else "timeout")
    counts = await actor.counts()
    assert (counts.trained, counts.filtered + counts.failed + counts.returned) == (1, 2)
    assert (counts.outstanding, counts.add_up) == (0, True)


async def test_lease_waits_for_n_and_gives_up_after_its_timeout():
    actor = make_actor()
    tickets = await actor.take("w", 2)
    await actor.put(meta(tickets[0]))
    assert await actor.lease("t", 2, timeout_s=0) == []
    assert await actor.lease("t", 2, timeout_s=0.01) == []
    async with waiting(actor.lease("t", 2)) as (lease,):
        await actor.put(meta(tickets[1]))
    assert [group.group_id for group in lease.result()] == [ticket.group_id for ticket in tickets]


async def test_close_wakes_every_waiter():
    actor = make_actor(window_limit=4, max_groups=2)
    tickets = await actor.take("w", 4)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket))
    await actor.lease("t", 1)
    puts = [actor.put(meta(ticket)) for ticket in tickets[2:]]
    takes = [actor.take("w", 1), actor.take("v", 1)]
    async with waiting(*puts, *takes, actor.lease("t", 2)) as tasks:
        await actor.close()
    *closed, lease = tasks[:2] + tasks[4:]
    assert all(isinstance(task.exception(), QueueClosed) for task in [*closed, lease])
    assert [task.result() for task in tasks[2:4]] == [[], []]
    for ticket in tickets[2:]:
        await actor.return_group(ticket.group_id, "shutdown")  # books can still be closed
    with pytest.raises(QueueClosed):
        await actor.lease("t", 1)
    assert await actor.take("w", 1) == []


async def test_a_lost_workers_pending_take_gets_nothing():
    actor = make_actor(window_limit=2)
    (kept, _) = await actor.take("other", 2)
    async with waiting(actor.take("w", 1)) as (take,):
        await actor.worker_lost("w")
        await actor.fail(kept.group_id, "x")
    assert take.result() == []
    assert len(await actor.take("w", 1)) == 1  # a worker restarted under the same name


async def test_a_lost_worker_that_comes_back_gets_no_tickets_beside_its_successor():
    """A network was broken: the worker is alive, and has the name of the worker that was started in its place."""
    actor = QueueActor(make_broker(window_limit=8))
    before = await actor.take("old/0", "w", 2)
    assert len(await actor.worker_lost("driver/0", "w")) == 2
    assert await actor.take("old/1", "w", 2) == []
    after = await actor.take("new/0", "w", 2)
    assert [ticket.group_id for ticket in after] == ["0-1.1", "0-2.1"]
    assert await actor.take("old/0", "w", 2) == [], "the answer of a call that is repeated is of groups that ended"
    assert await actor.take("old/2", "w", 2) == []
    assert len(await actor.take("other/0", "v", 2)) == 2
    with pytest.raises(UnknownGroup):
        await actor.put("old/3", meta(before[0]))
    # Repeated by Ray, the call that declared it lost is not a second loss.
    assert len(await actor.worker_lost("driver/0", "w")) == 2
    assert len(await actor.take("new/1", "w", 2)) == 2


async def test_clients_of_lost_workers_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(actor_module, "_FENCED", 2)
    actor = QueueActor(make_broker(window_limit=8))
    for number in range(9):
        await actor.take(f"{number}/0", "w", 1)
        await actor.worker_lost(f"driver/{number}", "w")
    assert (list(actor._fenced), actor._takers) == (["7", "8"], {})


async def test_the_end_of_the_dataset_ends_take_and_lease():
    actor = make_actor(rows=3)
    tickets = await actor.take("w", 3)
    async with waiting(actor.take("w", 1), actor.lease("t", 2)) as (take, lease):
        await actor.put(meta(tickets[0]))
        await actor.put(meta(tickets[1]))
        await settle()
        assert not take.done()  # prompts could come back
        trained = [group.group_id for group in lease.result()]
        async with waiting(actor.lease("t", 2)) as (starved,):
            await actor.ack(trained)
        assert isinstance(starved.exception(), QueueClosed)  # one group is left
        await actor.fail(tickets[2].group_id, "reward")
    assert take.result() == []


async def test_a_lease_that_waits_learns_that_the_dataset_ended():
    actor = make_actor(rows=1)
    await actor.take("w", 1)
    async with waiting(actor.lease("t", 2)) as (lease,), waiting(actor.take("w", 1)):
        pass
    assert isinstance(lease.exception(), QueueClosed)


async def test_stats_count_the_seconds_that_workers_wait():
    actor = make_actor(window_limit=2)
    await actor.take("w", 2)
    before = (await actor.stats()).take_wait_s
    async with waiting(actor.take("w", 1)):
        await asyncio.sleep(0.02)
        during = (await actor.stats()).take_wait_s
    assert during > before
    await settle()
    assert (await actor.stats()).take_wait_s >= during
