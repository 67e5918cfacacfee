"""The queue's actor: its waiting, first without Ray, then for real with encoded groups by reference."""

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import sys
import uuid

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError
from redis_server import RedisServer

from async_rl.config_file import validate
from async_rl.errors import ConfigError, DuplicateGroup, QueueClosed, QueueError, UnknownGroup
from async_rl.queue import redis_store
from async_rl.queue.broker import Broker
from async_rl.queue.client import Fetcher, Outbox, QueueClient, open_groups
from async_rl.queue.codec import encode
from async_rl.queue.journal import FileJournal
from async_rl.queue.ray_queue import QueueActor, start_queue
from async_rl.queue.records import GroupMeta
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory


class Source:
    """A cursor of ``rows`` prompts."""

    def __init__(self, rows=1000):
        self.prompts = [Prompt(f"0-{row}", row, "", np.array([1, 2], dtype=np.int32)) for row in range(1, rows + 1)]

    def next(self):
        return self.prompts.pop(0) if self.prompts else None

    def give_back(self, prompt):
        self.prompts.insert(0, prompt)

    def prompt(self, prompt_id):
        return Prompt(prompt_id, int(prompt_id.partition("-")[2]), "", np.array([1, 2], dtype=np.int32))

    def state(self):
        return {"prompts": [prompt.prompt_id for prompt in self.prompts]}

    def restore(self, state):
        self.prompts = [self.prompt(prompt_id) for prompt_id in state["prompts"]]


def make_actor(rows=1000, **settings):
    defaults = {
        "required_groups": 2,
        "window_limit": 4,
        "max_staleness": 1,
        "on_stale": "mask",
        "max_bytes": 1000,
    }
    return Called(QueueActor(Broker(Source(rows), **defaults | settings)))


class Called:
    """An actor whose calls get their ids here, as a client gives them."""

    def __init__(self, actor):
        self.actor, self.ids = actor, itertools.count()

    def __getattr__(self, method):
        def call(*arguments, **keywords):
            if method in ("close", "stats", "counts"):
                return getattr(self.actor, method)()
            if method in ("take", "put", "lease", "worker_lost"):
                return getattr(self.actor, method)(str(next(self.ids)), *arguments, **keywords)
            return self.actor.decide(str(next(self.ids)), method, *arguments)

        return call


def meta(ticket, nbytes=10):
    return GroupMeta(ticket.group_id, 100, nbytes, ticket.version, ticket.version, 1, 0)


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


# Without Ray


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


async def test_a_put_that_waits_in_vain_is_an_error_and_not_a_stall():
    actor = make_actor(max_bytes=100, required_groups=2)
    tickets = await actor.take("w", 3)
    await actor.put(meta(tickets[0], 60))
    async with asyncio.timeout(5):
        with pytest.raises(QueueError, match=r"queue\.max_bytes"):
            await actor.put(meta(tickets[1], 60))


async def test_a_group_returned_while_its_put_waits_is_refused():
    actor = make_actor(max_groups=2)
    tickets = await actor.take("w", 3)
    for ticket in tickets[:2]:
        await actor.put(meta(ticket))
    async with waiting(actor.put(meta(tickets[2]))) as (put,):
        await actor.return_group(tickets[2].group_id, "interrupted")
    assert isinstance(put.exception(), UnknownGroup)


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


# With Ray


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(params=["memory", "redis"])
def backend(request):
    """Settings of the queue's backend; the durable one has a server of its own."""
    return {} if request.param == "memory" else request.getfixturevalue("redis_server").settings


@pytest.fixture
def config(backend):
    name = f"run-{uuid.uuid4().hex[:8]}"

    def _config(**overrides):
        tree = {
            "name": name,
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "async_training": {"staleness_threshold": 1.0},
            "trainer": {"groups_per_step": 2},
        }
        queue = backend | overrides.pop("queue", {})
        return validate(tree | {"queue": queue} | overrides)

    return _config


@pytest.fixture
def fetcher(config):
    return Fetcher(config())


@pytest.fixture
def start(cluster, config):
    clients = []

    def _start(rows=1000, journal=None, **overrides):
        settings = config(**overrides)
        client = start_queue(settings, Source(rows), journal=journal)
        client.config = settings
        clients.append(client)
        return client

    yield _start
    for client in clients:
        ray.kill(client.actor)


def make_group(ticket, tokens=50, seed=0):
    rng = np.random.default_rng(seed)
    spec = RoutingSpec(48, 8, 128)
    p = len(ticket.prompt.token_ids)
    trajectory = Trajectory(
        trajectory_id=f"{ticket.group_id}/0",
        prompt_ids=ticket.prompt.token_ids,
        response_ids=rng.integers(0, 100, tokens).astype(np.int32),
        logprobs=rng.normal(size=tokens).astype(np.float32),
        versions=np.full(tokens, ticket.version, dtype=np.int32),
        segments=(Segment(0, tokens, ticket.version),),
        reward=1.0,
        finish_reason="stop",
        routed_experts=rng.integers(0, 128, (p + tokens - 1, 48, 8)).astype(np.uint8),
        routing=spec,
    )
    return Group(ticket.group_id, ticket.prompt, (trajectory,))


@pytest.mark.ray
async def test_groups_travel_by_reference_and_arrive_intact(start, fetcher):
    client = start()
    tickets = await client.take("w", 4)
    groups = [make_group(ticket, seed=i) for i, ticket in enumerate(tickets)]
    metas = await asyncio.gather(*(client.put(group) for group in groups))
    assert metas[0].nbytes == len(encode(groups[0]))
    leased = await client.lease("trainer", 2)
    by_id = {group.group_id: group for group in groups}
    for received in fetcher.groups([payload for _, payload in leased]):
        group = by_id[received.group_id]
        assert encode(received).tobytes() == encode(group).tobytes()
        assert not received.trajectories[0].routed_experts.flags.owndata
    stats = await client.stats()
    assert (stats.queued_groups, stats.leased_groups) == (2, 2)
    assert stats.held_bytes == sum(m.nbytes for m in metas)
    await client.release([leased[1][0].group_id])
    await client.ack([leased[0][0].group_id])
    await client.advance(1)
    counts = await client.counts()
    assert (counts.issued, counts.trained, counts.outstanding) == (4, 1, 3)


@pytest.mark.ray
async def test_errors_of_the_broker_arrive_as_themselves(start):
    client = start()
    (ticket,) = await client.take("w", 1)
    group = make_group(ticket)
    results = await asyncio.gather(client.put(group), client.put(group), return_exceptions=True)
    (refused,) = [result for result in results if not isinstance(result, GroupMeta)]
    assert type(refused) is DuplicateGroup
    assert str(refused).startswith(f"group {ticket.group_id}: was put before")
    assert len(await client.lease("trainer", 1)) == 1  # with the payload of the one that was taken
    with pytest.raises(UnknownGroup) as error:
        await client.ack(["0-9.9"])
    assert type(error.value) is UnknownGroup


@pytest.mark.ray
async def test_back_pressure_and_close_across_processes(start):
    client = start(queue={"max_groups": 2})
    tickets = await client.take("w", 4)
    await asyncio.gather(*(client.put(make_group(ticket)) for ticket in tickets[:2]))
    third = asyncio.create_task(client.put(make_group(tickets[2])))
    leased = await client.lease("trainer", 2)
    await asyncio.sleep(0.2)
    assert not third.done()
    await client.ack([group.group_id for group, _ in leased])
    await third
    fourth = asyncio.create_task(client.put(make_group(tickets[3])))
    await fourth
    take = asyncio.create_task(client.take("w", 1))
    lease = asyncio.create_task(client.lease("trainer", 2))
    await lease
    lease = asyncio.create_task(client.lease("trainer", 1))
    await asyncio.sleep(0.2)
    assert not take.done()
    await client.close()
    assert await take == []
    with pytest.raises(QueueClosed):
        await lease


@ray.remote(num_cpus=0)
class Worker:
    """A rollout worker in a process of its own, reduced to what the queue sees of one."""

    def __init__(self, name, actor, config):
        self.name, self.outbox = name, Outbox(actor, open_groups(config, name))

    async def groups(self, n):
        async for item in self.outbox.stream(self.produce(n)):
            yield item

    async def produce(self, n):
        tickets = await self.outbox.take(self.name, n)
        await asyncio.gather(*(self.outbox.put(make_group(ticket)) for ticket in tickets))

    async def accepted(self, group_id):
        self.outbox.accepted(group_id)


async def collect(worker, client, n):
    """Hand in what the worker finishes, as the driver does."""
    stream = worker.groups.options(num_returns="streaming").remote(n)
    metas = []
    async for first in stream:
        meta = await first
        await client.put_stored(meta, [await anext(stream)])
        worker.accepted.remote(meta.group_id)
        metas.append(meta.group_id)
    return metas


@pytest.mark.ray
async def test_invariant_5_a_dead_worker_takes_nothing_along_that_it_had_finished(start, fetcher):
    client = start()
    doomed = Worker.remote("doomed", client.actor, client.config)
    finished = await collect(doomed, client, 2)
    (running,) = await client.take("doomed", 1)
    ray.kill(doomed)
    assert await client.worker_lost("doomed") == [running.group_id]
    leased = await client.lease("trainer", 2)
    assert [group.group_id for group in fetcher.groups([payload for _, payload in leased])] == finished
    await client.ack(finished)
    counts = await client.counts()
    assert (counts.issued, counts.trained, counts.returned, counts.dropped, counts.outstanding) == (3, 2, 1, 0, 0)
    await client.advance(1)
    (again,) = await client.take("other", 1)
    assert again.prompt.prompt_id == running.prompt.prompt_id


@pytest.mark.ray
async def test_invariant_5_the_queue_dies_and_is_rebuilt_while_everybody_waits_for_it(start, fetcher, tmp_path):
    """SIGKILL between and during calls: what was handed in is leased, with its payload, each once."""
    client = start(journal=tmp_path / "queue.journal", recovery={"max_restarts": 8})
    worker = Worker.remote("w", client.actor, client.config)
    trained, pids = [], set()
    for version in range(1, 6):
        collected = asyncio.create_task(collect(worker, client, 4))
        lease = asyncio.create_task(client.lease("trainer", 4))
        await asyncio.sleep(0.02 * version)  # the kill falls somewhere between a take and the lease
        stats = await client.stats()
        pids.add(stats.pid)
        os.kill(stats.pid, signal.SIGKILL)
        leased = await lease
        assert [meta.group_id for meta, _ in leased] == await collected
        assert [g.group_id for g in fetcher.groups([payload for _, payload in leased])] == [
            m.group_id for m, _ in leased
        ]
        await client.ack([meta.group_id for meta, _ in leased], version)
        trained += [meta.group_id for meta, _ in leased]
        await client.advance(version)
        counts = await client.counts()
        assert counts.add_up
        assert (counts.trained, counts.outstanding, counts.returned) == (4 * version, 0, 0)
    assert len(pids) == 5
    assert sorted(trained) == sorted(f"0-{row}.0" for row in range(1, 21))  # none skipped, none twice
    ray.kill(worker)


@pytest.mark.ray
async def test_a_queue_that_dies_too_often_stays_dead(start, tmp_path):
    client = start(journal=tmp_path / "queue.journal", recovery={"max_restarts": 1})
    for _ in range(2):
        os.kill((await client.stats()).pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
    with pytest.raises(ActorDiedError):
        await client.counts()


@pytest.mark.ray
def test_the_client_can_be_sent_with_its_batching_state_left_behind(start):
    client = start()
    copy = ray.get(ray.put(client))
    assert isinstance(copy, QueueClient)
    assert copy.actor == client.actor


@pytest.mark.ray
@pytest.mark.parametrize("backend", ["redis"], indirect=True)
async def test_groups_in_redis_outlive_the_cluster(start, fetcher, config):
    """All processes are gone, but for the server: what was queued and leased is there, what was trained is not."""
    settings = config(checkpoint={"every": 1})
    before = start(checkpoint={"every": 1})
    first, second, third, running = await before.take("w", 4)
    groups = [make_group(ticket, seed=i) for i, ticket in enumerate((first, second, third))]
    for group in groups:
        await before.put(group)
    (trained,) = await before.lease("trainer", 1)
    await before.ack([trained[0].group_id], 1)
    await before.checkpointed(1)
    (leased,) = await before.lease("trainer", 1)
    orphan = open_groups(settings, "w").add("0-99.0", np.zeros(8, np.uint8))  # its worker died before it was handed in
    ray.kill(before.actor)

    after = start_queue(settings, Source(0))
    assert await after.worker_lost("w") == [running.group_id]
    assert await after.recover(1) == 0  # the newest version in it
    again = await after.lease("trainer", 2)
    assert [meta.group_id for meta, _ in again] == [leased[0].group_id, third.group_id]  # in the order they had
    received = fetcher.groups([payload for _, payload in again])
    assert [encode(group).tobytes() for group in received] == [encode(group).tobytes() for group in groups[1:]]
    with pytest.raises(QueueError, match="has no entry"):
        fetcher.messages([orphan])
    await after.ack([meta.group_id for meta, _ in again], 2)
    counts = await after.counts()
    assert (counts.trained, counts.returned, counts.outstanding, counts.add_up) == (3, 1, 0, True)
    ray.kill(after.actor)


@pytest.mark.ray
@pytest.mark.parametrize("backend", ["redis"], indirect=True)
async def test_the_server_of_the_durable_backend_restarts_under_load(start, redis_server):
    server = redis_server
    client = start()
    worker = Worker.remote("w", client.actor, client.config)
    collected = asyncio.create_task(collect(worker, client, 4))
    await asyncio.sleep(0.05)
    server.kill()
    await asyncio.sleep(0.3)
    server.start()
    assert len(await collected) == 4
    leased = await client.lease("trainer", 4)
    assert len(Fetcher(client.config).groups([payload for _, payload in leased])) == 4
    await client.ack([meta.group_id for meta, _ in leased])
    assert (await client.counts()).add_up
    ray.kill(worker)


def test_tls_and_password_and_what_a_wrong_one_says(tmp_path):
    with RedisServer(tls=True) as server:
        settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": server.settings}).queue.redis
        redis_store.check(settings, "run", resume=False)
        store = redis_store.RedisGroups(settings, "run", "w")
        assert store.read([store.add("0-1.0", b"abc")]) == [b"abc"]
        journal = redis_store.RedisJournal(settings, "run")
        journal.append(["a", "advance", [1]])
        with pytest.raises(ConfigError, match="holds the groups of a run 'run'"):
            redis_store.check(settings, "run", resume=False)
        redis_store.check(settings, "run", resume=True)
        redis_store.remove(settings, "run")
        redis_store.check(settings, "run", resume=False)
        (tmp_path / "wrong").write_text("wrong")
        with pytest.raises(ConfigError, match=r"queue\.redis\.url .*(WRONGPASS|invalid)"):
            redis_store.check(settings.model_copy(update={"password_file": tmp_path / "wrong"}), "run", resume=False)
        with pytest.raises(ConfigError, match=r"queue\.redis\.url .*certificate"):
            redis_store.check(settings.model_copy(update={"ca_file": None}), "run", resume=False)


async def test_the_durable_journal_rebuilds_a_broker_like_the_file_does(redis_server, tmp_path):
    settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": redis_server.settings}).queue.redis
    made = itertools.count()
    name = f"run-{uuid.uuid4().hex[:8]}"
    for open_journal in (
        functools.partial(redis_store.RedisJournal, settings, name),
        functools.partial(FileJournal, tmp_path / "journal"),
    ):

        def broker():
            return Broker(
                Source(50), required_groups=2, window_limit=4, max_staleness=1, on_stale="mask", max_bytes=1000
            )

        actor = QueueActor(broker(), open_journal)
        tickets = await actor.take("1", "w", 4)
        await actor.put("2", meta(tickets[0]))
        await actor.put("3", meta(tickets[1]))
        leased = await actor.lease("4", "t", 2)
        await actor.decide("5", "ack", [leased[0].group_id], 1)
        if next(made):  # a torn frame, of a call that nobody was told about
            with (tmp_path / "journal").open("ab") as file:
                file.write(b"\x40\x00\x00\x00garbage")
        again = QueueActor(broker(), open_journal)
        assert again._broker.state() == actor._broker.state()
        # Calls whose answers were lost are answered as they were.
        assert [t.group_id for t in await again.take("1", "w", 4)] == [t.group_id for t in tickets[2:]]
        assert await again.put("2", meta(tickets[0])) is True
        assert [m.group_id for m in await again.lease("4", "t", 2)] == [leased[1].group_id]
        await again.decide("5", "ack", [leased[0].group_id], 1)
        assert again._broker.state() == actor._broker.state()
        # And once more after everything was written anew in one event.
        again._journal.compact(["", "restore", [again._broker.state(), list(again._answers.items())]])
        third = QueueActor(broker(), open_journal)
        assert third._broker.state() == actor._broker.state()
        assert await third.put("2", meta(tickets[0])) is True


def test_a_journal_that_is_damaged_in_the_middle_is_refused(tmp_path):
    journal = FileJournal(tmp_path / "journal")
    for version in (1, 2, 3):
        journal.append([str(version), "advance", [version]])
    data = bytearray((tmp_path / "journal").read_bytes())
    data[10] ^= 1
    (tmp_path / "journal").write_bytes(data)
    with pytest.raises(QueueError, match="damaged at byte 0"):
        list(journal.replay())
