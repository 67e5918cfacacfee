"""Hosts that are lost with what lies on them: finished groups, the workers that made them, trainer ranks that read.

The hosts are Ray nodes on one machine (``ray.cluster_utils.Cluster``), each with an object store of its own, and with a
resource of its own name by which actors are placed. Queue, handover, leases and the ranks' reading are real; what
samples and what computes are stand-ins.
"""

import asyncio
import contextlib
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import ray
import structlog
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from async_rl.config.loading import validate
from async_rl.driver.actors import TrainerRanks
from async_rl.errors import TrainerDied
from async_rl.queue.codec import encode
from async_rl.queue.fetcher import Fetcher
from async_rl.queue.handover import Outbox, collect
from async_rl.queue.records import Ticket
from async_rl.queue.start import start_queue
from async_rl.runtime import timeouts
from async_rl.runtime.failures import is_worker_lost
from async_rl.trainer.worker import TrainerWorker
from tests.support import queue_parts
from tests.support.bare_loop import bare_loop
from tests.support.queue_parts import Source, make_group

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORE_BYTES = 100 * 2**20
# Ray's own take it a minute to conclude that a silent host is dead.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
WITHIN_S = 300.0
"""Ends a test that hangs, and judges no time."""


class Hosts:
    """The driver's host, which is the head, and others by name."""

    def __init__(self, *names, system):
        head = {"num_cpus": 2, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": system}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = {}
        for name in names:
            resources = {name: 100}
            self._nodes[name] = self._cluster.add_node(
                num_cpus=1, object_store_memory=STORE_BYTES, resources=resources, include_dashboard=False
            )
        self._cluster.connect()
        self._cluster.wait_for_nodes()

    def start(self, name, cls, *arguments):
        """Start an actor on a host; "driver" for the driver's."""
        resources = {"node:__internal_head__": 0.001} if name == "driver" else {name: 1}
        return ray.remote(num_cpus=0, resources=resources)(cls).remote(*arguments)

    def id(self, name):
        return self._nodes[name].node_id

    def kill(self, name):
        """End a host, with all of its processes, as a power cut does."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    @contextlib.contextmanager
    def silent(self, name):
        """Stop the object store of a host, and let it continue."""
        (raylet,) = self._nodes[name].all_processes[ray_constants.PROCESS_TYPE_RAYLET]
        os.kill(raylet.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(raylet.process.pid, signal.SIGCONT)

    def close(self):
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture
def hosts():
    for module in (sys.modules[__name__], queue_parts):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    made = []

    def make(*names, system=QUICK):
        made.append(Hosts(*names, system=system))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def start(tmp_path):
    def make(**queue):
        config = validate(
            {
                "name": "run",
                "runs": str(tmp_path),
                "model": {"path": "model"},
                "data": {"train": "train.jsonl"},
                "async_training": {"staleness_threshold": 2.0},
                "trainer": {"groups_per_step": 4},
                "queue": {"max_bytes": 2**26, **queue},
            }
        )
        return start_queue(config, Source(), journal=tmp_path / "journal"), config

    return make


def megabyte(ticket):
    """Return a group whose message takes 1 MB. The same id always has the same content."""
    return make_group(ticket, tokens=2600, seed=ticket.prompt.row)


def ticket_of(row):
    prompt_id = f"0-{row}"
    return Ticket(f"{prompt_id}.0", Source().prompt(prompt_id), version=0)


class Worker:
    """A rollout worker, reduced to what the queue sees of one."""

    def __init__(self, name, queue):
        self._name, self._outbox = name, Outbox(queue)

    async def groups(self, count):
        async for item in self._outbox.stream(self._produce(count)):
            yield item

    async def _produce(self, count):
        for _ in range(count):
            tickets = await self._outbox.take(self._name, 1)
            if not tickets:
                return
            await self._outbox.put(megabyte(tickets[0]))

    async def accepted(self, group_id):
        self._outbox.accepted(group_id)


class Rank(TrainerWorker):
    """A trainer rank that reads its groups as the real one does, and notes them in place of training."""

    def __init__(self, config):
        super().__init__(config, 0, None)
        self._trainer = SimpleNamespace(begin_step=lambda **_: None, accumulate=self._note)
        self._seen = {}

    def _note(self, groups):
        self._seen |= {group.group_id: bytes(encode(group)) for group in groups}

    def finish_step(self):
        seen, self._seen = self._seen, {}
        return seen


class Records(list):
    def event(self, name, **fields):
        self.append((name, fields))


def produce(client, worker, count=10**6):
    """Hand in what a worker finishes, as the driver does."""
    stream = worker.groups.options(num_returns="streaming").remote(count)
    return asyncio.ensure_future(collect(client, stream, worker.accepted.remote))


def make_loop(client, *actors):
    trainers = object.__new__(TrainerRanks)
    trainers._ranks = list(actors)
    records = Records()
    return bare_loop(client, trainers, records, groups=4, ranks=len(actors)), records


def hosts_of(client, group_id):
    """Return the hosts that have each of a group's references."""
    references = client.payload(group_id)
    found = ray.experimental.get_object_locations(references)
    return [set(found[reference]["node_ids"]) for reference in references]


async def finished(client, count):
    """Wait until so many groups are queued."""
    async with asyncio.timeout(WITHIN_S):
        while (await client.stats()).queued_groups < count:
            await asyncio.sleep(0.05)


async def train_all(client, rank):
    """Train the twelve groups of the window in three steps, and see that each is as its worker made it."""
    loop, records = make_loop(client, rank)
    async with asyncio.timeout(WITHIN_S):
        for step, first_row in enumerate((1, 5, 9), start=1):
            (trained,) = await loop._streamed_update([])
            rows = range(first_row, first_row + 4)
            assert trained == {f"0-{row}.0": bytes(encode(megabyte(ticket_of(row)))) for row in rows}
            await client.ack(list(trained), step)
    assert records == []
    counts, stats = await client.counts(), await client.stats()
    assert (stats.returned, stats.dropped, counts.trained, counts.outstanding) == ({}, {}, 12, 0)


async def test_invariant_5_groups_of_a_lost_host_are_issued_again_and_the_step_takes_others(hosts, start):
    cluster = hosts("a", "b")
    client, config = start()
    lost = cluster.start("a", Worker, "lost", client.actor)
    await asyncio.wait_for(produce(client, lost, 3), WITHIN_S)
    cluster.kill("a")
    other = produce(client, cluster.start("b", Worker, "other", client.actor), 12)
    loop, records = make_loop(client, cluster.start("b", Rank, config))
    trained = set()
    async with asyncio.timeout(WITHIN_S):
        for step in (1, 2, 3):
            leased = []
            (seen,) = await loop._streamed_update(leased)
            assert sorted(seen) == sorted(meta.group_id for meta, _ in leased)
            await client.ack(list(seen), step)
            trained |= set(seen)
    assert sum(fields["groups"] for name, fields in records if name == "payloads_lost") == 3
    assert trained >= {"0-1.1", "0-2.1", "0-3.1"}, "the prompts of the lost groups are issued again"
    assert {group_id.partition(".")[0] for group_id in trained} == {f"0-{row}" for row in range(1, 13)}
    counts, stats = await client.counts(), await client.stats()
    assert counts.add_up
    assert (stats.dropped, counts.trained, counts.outstanding) == ({"payload_lost": 3}, 12, 0)
    await asyncio.wait_for(other, WITHIN_S)
    ray.kill(client.actor)


async def test_with_two_copies_no_finished_group_is_lost_with_its_host(hosts, start):
    cluster = hosts("a", "b")
    client, config = start(copies=2)
    producing = produce(client, cluster.start("a", Worker, "w", client.actor))
    await finished(client, 12)  # as many as the window admits: the worker waits, and its stream has not ended
    message, copy = hosts_of(client, "0-1.0")
    assert copy == {cluster.id("b")}
    assert message <= {cluster.id("a"), cluster.id("b")}, "nothing came to the driver's host"
    cluster.kill("a")
    await train_all(client, cluster.start("driver", Rank, config))
    (error,) = await asyncio.gather(producing, return_exceptions=True)
    assert is_worker_lost(error), error
    ray.kill(client.actor)


@pytest.mark.parametrize(("first", "second"), ["ab", "ba"])
async def test_with_two_copies_two_losses_in_turn_lose_no_finished_group(hosts, start, first, second):
    """Groups are made on host a, and copied to b and c. A loss takes the messages, or some of the copies."""
    cluster = hosts("a", "b", "c")
    client, config = start(copies=2)
    client._copies._random.seed(0)  # both have some
    producing = produce(client, cluster.start("a", Worker, "w", client.actor))
    await finished(client, 12)
    groups = [f"0-{row}.0" for row in range(1, 13)]
    with structlog.testing.capture_logs() as lines:
        cluster.kill(first)
        async with asyncio.timeout(WITHIN_S):
            while not (found := [line for line in lines if line["event"] == "copies_lost"]):
                await asyncio.sleep(0.1)
    assert (found[0]["hosts"], found[0]["copied"]) == (1, found[0]["groups"])
    assert found[0]["groups"] == 12 or first == "b"
    for group_id in groups:
        assert set(client._copies._kept[group_id].hosts) == {cluster.id(second), cluster.id("c")}
        assert set().union(*hosts_of(client, group_id)) == {cluster.id(second), cluster.id("c")}
    cluster.kill(second)
    await train_all(client, cluster.start("driver", Rank, config))
    (error,) = await asyncio.gather(producing, return_exceptions=True)
    assert is_worker_lost(error), error
    ray.kill(client.actor)


async def test_a_run_goes_on_when_the_host_of_one_of_its_workers_is_lost(hosts, start):
    """Steps follow each other while groups are finished, queued and leased. No prompt is trained twice."""
    cluster = hosts("a", "b", "c")
    client, config = start()
    loop, _ = make_loop(client, cluster.start("c", Rank, config), cluster.start("driver", Rank, config))

    async def supervise(name, host):
        worker = cluster.start(host, Worker, name, client.actor)
        (error,) = await asyncio.gather(produce(client, worker), return_exceptions=True)
        assert is_worker_lost(error), error
        await client.worker_lost(name)
        await produce(client, cluster.start("b", Worker, name, client.actor))

    supervised = [asyncio.create_task(supervise(f"w{number}", host)) for number, host in enumerate("ab")]
    trained = []
    async with asyncio.timeout(2 * WITHIN_S):
        for step in range(1, 21):
            if step == 6:
                killing = asyncio.create_task(asyncio.to_thread(cluster.kill, "a"))
            leased = []
            await loop._streamed_update(leased)
            await client.ack([meta.group_id for meta, _ in leased], step)
            trained += [meta.group_id.partition(".")[0] for meta, _ in leased]
            await client.advance(step)
            loop._version = step
        await killing
    for task in supervised:
        task.cancel()
    assert len(trained) == 80 == len(set(trained)), "a prompt was trained twice"
    counts = await client.counts()
    assert counts.add_up
    assert counts.trained == 80
    ray.kill(client.actor)


async def test_the_host_of_a_trainer_rank_that_is_lost_is_a_death(hosts, start):
    cluster = hosts("a", "b")
    client, config = start()
    producing = produce(client, cluster.start("b", Worker, "w", client.actor), 4)
    loop, _ = make_loop(client, cluster.start("b", Rank, config), cluster.start("a", Rank, config))
    await finished(client, 2)
    assert await loop._trainers.fetch([[], []]) == []
    cluster.kill("a")
    leased = []
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(TrainerDied, match="trainer rank 1 died during fetch"):
            await loop._streamed_update(leased)
    await client.release([meta.group_id for meta, _ in leased])
    await asyncio.wait_for(producing, WITHIN_S)
    assert (await client.stats()).queued_groups == 4
    ray.kill(client.actor)


async def test_a_host_that_is_silent_is_waited_for_and_given_up_in_time(hosts, start, monkeypatch):
    """Ray takes it for alive all the while. What has not come is lost, and comes once the host answers again."""
    cluster = hosts("a", system=QUICK | {"health_check_failure_threshold": 1000})
    client, config = start()
    await asyncio.wait_for(produce(client, cluster.start("a", Worker, "w", client.actor), 3), WITHIN_S)
    payloads = {meta.group_id: payload for meta, payload in await client.lease("trainer", 3)}
    fetcher = Fetcher(config)
    with cluster.silent("a"):
        monkeypatch.setattr(timeouts, "PAYLOAD_S", 1.0)
        assert await asyncio.wait_for(asyncio.to_thread(fetcher.hold, payloads), WITHIN_S) == list(payloads)
    monkeypatch.setattr(timeouts, "PAYLOAD_S", WITHIN_S)
    assert await asyncio.to_thread(fetcher.hold, payloads) == []
    ray.kill(client.actor)
