"""The queue for real: its process, its clients in others, encoded groups by reference; in memory and in Redis."""

import asyncio
import os
import signal
import sys
import uuid

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError

from async_rl.config.loading import validate
from async_rl.driver import queued_groups
from async_rl.errors import DuplicateGroup, PayloadLost, QueueClosed, UnknownGroup
from async_rl.queue.client import QueueClient, open_groups
from async_rl.queue.codec import encode
from async_rl.queue.fetcher import Fetcher
from async_rl.queue.handover import Outbox, incoming
from async_rl.queue.records import GroupMeta
from async_rl.queue.start import start_queue
from async_rl.runtime.manifest import checksum_of
from tests.support import queue_parts
from tests.support.queue_parts import Source, make_group


@pytest.fixture(scope="module")
def cluster():
    for module in (sys.modules[__name__], queue_parts):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    # "local": another process of the tests may have a cluster on this host, which Ray would find.
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.slow)])
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


def payloads(leased):
    return {meta.group_id: payload for meta, payload in leased}


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


@pytest.mark.ray
async def test_groups_travel_by_reference_and_arrive_intact(start, fetcher):
    client = start()
    tickets = await client.take("w", 4)
    groups = [make_group(ticket, seed=i) for i, ticket in enumerate(tickets)]
    metas = await asyncio.gather(*(client.put(group) for group in groups))
    assert metas[0].nbytes == len(encode(groups[0]))
    leased = await client.lease("trainer", 2)
    by_id = {group.group_id: group for group in groups}
    for received in fetcher.groups(payloads(leased)):
        group = by_id[received.group_id]
        assert encode(received).tobytes() == encode(group).tobytes()
        assert not received.trajectories[0].routed_experts.flags.owndata
    (excerpt,) = fetcher.excerpts([("second", leased[1][1], 0)])
    shown = by_id[leased[1][0].group_id].trajectories[0]
    assert excerpt.trajectory_id == shown.trajectory_id
    np.testing.assert_array_equal(excerpt.response_ids, shown.response_ids)
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
    async for meta, payload in incoming(stream):
        await client.put_stored(meta, payload)
        worker.accepted.remote(meta.group_id)
        metas.append(meta.group_id)
    return metas


@ray.remote(num_cpus=0)
class Dying:
    """Ends after so many values of its stream, of which a group has three, as a rollout worker's has."""

    async def groups(self, values):
        for value in range(values):
            yield (None, np.full(10**6, value, np.uint8), value)[value % 3]
        await asyncio.sleep(1)  # Ray sends what is yielded in the background, and what it has not sent dies as well
        os._exit(1)


@pytest.mark.ray
@pytest.mark.parametrize("values", range(8))
async def test_a_worker_that_dies_between_a_message_and_its_meta_has_not_sent_it(cluster, values):
    came = []

    async def receive():
        async for meta, (message,) in incoming(Dying.remote().groups.options(num_returns="streaming").remote(values)):
            came.append((meta, (await message)[0]))

    with pytest.raises(ActorDiedError):
        await receive()
    assert came == [(value, value - 1) for value in range(2, values, 3)]


@pytest.mark.ray
async def test_the_driver_takes_groups_without_reading_their_messages(start, fetcher, monkeypatch):
    client, read = start(), []
    worker = type(ray._private.worker.global_worker)
    deserialize = worker.deserialize_objects

    def counting(self, serialized, *arguments, **named):
        read.extend(len(data) for data, *_ in serialized if data is not None)
        return deserialize(self, serialized, *arguments, **named)

    monkeypatch.setattr(worker, "deserialize_objects", counting)
    doomed = Worker.remote("worker", client.actor, client.config)
    stream = doomed.groups.options(num_returns="streaming").remote(3)
    sizes = []
    async for meta, payload in incoming(stream):
        await client.put_stored(meta, payload)
        doomed.accepted.remote(meta.group_id)
        sizes.append(meta.nbytes)
    assert len(sizes) == 3
    assert sum(read) < min(sizes), "not even one message"
    leased = await client.lease("trainer", 3)
    fetcher.groups(payloads(leased))
    assert sum(read) > sum(sizes) or client.config.queue.backend == "redis", "else this test sees nothing"


@pytest.mark.ray
async def test_invariant_5_a_dead_worker_takes_nothing_along_that_it_had_finished(start, fetcher):
    client = start()
    doomed = Worker.remote("doomed", client.actor, client.config)
    finished = await collect(doomed, client, 2)
    (running,) = await client.take("doomed", 1)
    ray.kill(doomed)
    assert await client.worker_lost("doomed") == [running.group_id]
    leased = await client.lease("trainer", 2)
    assert [group.group_id for group in fetcher.groups(payloads(leased))] == finished
    await client.ack(finished)
    counts = await client.counts()
    assert (counts.issued, counts.trained, counts.returned, counts.dropped, counts.outstanding) == (3, 2, 1, 0, 0)
    await client.advance(1)
    assert await client.take("doomed", 1) == [], "the client of a lost worker gets no more"
    (again,) = await QueueClient(client.actor).take("other", 1)
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
        assert [g.group_id for g in fetcher.groups(payloads(leased))] == [m.group_id for m, _ in leased]
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
    received = fetcher.groups(payloads(again))
    assert [encode(group).tobytes() for group in received] == [encode(group).tobytes() for group in groups[1:]]
    with pytest.raises(PayloadLost, match=r"0-99\.0"):
        fetcher.messages({"0-99.0": orphan})
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
    assert len(Fetcher(client.config).groups(payloads(leased))) == 4
    await client.ack([meta.group_id for meta, _ in leased])
    assert (await client.counts()).add_up
    ray.kill(worker)


async def test_messages_of_a_checkpoint_are_written_by_another_process(cluster, tmp_path, monkeypatch):
    """On several hosts: test_queued_groups.py."""
    monkeypatch.setattr(queued_groups, "write_file", None)  # here, and in no process that writes
    sizes = {"0-1.0": 10**6, "0-2.0": 100}  # in the object store, and with the driver's process
    messages = {group_id: np.full(size, 7, np.uint8) for group_id, size in sizes.items()}
    references = {group_id: ray.put(message) for group_id, message in messages.items()}
    payloads = {group_id: [reference] for group_id, reference in references.items()}
    saved = await queued_groups.write(tmp_path / "pipeline" / "queued", payloads)
    assert list(saved) == ["0-1.0", "0-2.0"]
    for group_id, (file, entry) in saved.items():
        content = (tmp_path / "pipeline" / "queued" / file).read_bytes()
        assert content == messages[group_id].tobytes()
        assert entry == (len(content), checksum_of(content))
