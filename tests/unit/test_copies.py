"""Where copies of finished groups go, and when they are let go. Ray is a stand-in; tests/cluster has the real one."""

import asyncio
from types import SimpleNamespace

import pytest
import structlog
from ray.exceptions import ActorDiedError, ActorUnschedulableError, ObjectLostError, RayTaskError

from async_rl.queue import copies as copies_module
from async_rl.queue.client import QueueClient
from async_rl.queue.copies import Copies, CopyHolder
from async_rl.queue.records import GroupMeta
from async_rl.runtime import timeouts


class Cluster:
    """Hosts by name; ``places`` has the hosts of each message. A host may have an error in place of its holder."""

    def __init__(self, *hosts):
        self.hosts, self.places, self.holders = list(hosts), {}, {}

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "driver")

    @property
    def experimental(self):
        return SimpleNamespace(
            get_object_locations=lambda references: {r: {"node_ids": self.places.get(r, [])} for r in references}
        )

    def nodes(self):
        return [{"NodeID": host, "Alive": host != "dead"} for host in self.hosts]

    def held(self):
        return {host: sorted(holder.subject._held) for host, holder in self.holders.items() if holder.subject._held}


class Handle:
    """The remote handle of a holder, which runs it here."""

    def __init__(self, fault=None):
        self.subject, self.fault = CopyHolder(), fault
        self.hold = SimpleNamespace(remote=self._hold)
        self.drop = SimpleNamespace(remote=lambda ids: asyncio.ensure_future(self.subject.drop(ids)))

    async def _hold(self, group_id, payload):
        if self.fault is not None:
            raise self.fault
        future = asyncio.get_running_loop().create_future()
        future.set_result(f"message of {payload[0]}")
        await self.subject.hold(group_id, [future])


@pytest.fixture
def cluster(monkeypatch):
    found = Cluster("driver", "a", "b", "c", "dead")
    found.places = {"on a": ["a"], "on b": ["b"], "on driver": ["driver"], "on a and driver": ["a", "driver"]}
    monkeypatch.setattr(copies_module, "ray", found)
    faults = found.faults = {}

    def start(host):
        found.holders[host] = Handle(faults.get(host))
        return found.holders[host]

    monkeypatch.setattr(copies_module, "_start_holder", start)
    return found


async def test_a_copy_goes_to_another_living_host_with_the_fewest(cluster):
    copies = Copies()
    for number in range(6):
        await copies.add(f"g{number}", "on a")
    assert {host: len(ids) for host, ids in cluster.held().items()} == {"driver": 2, "b": 2, "c": 2}
    copies.drop(["g0", "g1", "g2", "g3", "unknown"])
    await asyncio.sleep(0)
    assert sum(len(ids) for ids in cluster.held().values()) == 2
    copies.drop(["g4", "g5"])
    await asyncio.sleep(0)
    assert cluster.held() == copies._hosts == {}


@pytest.mark.parametrize("reference", ["on driver", "on a and driver", "in the driver's process"])
async def test_what_only_the_drivers_death_can_lose_is_not_copied(cluster, reference):
    await Copies().add("g", reference)
    assert cluster.holders == {}


async def test_one_host_keeps_one_copy_and_says_so_once(cluster):
    cluster.hosts = ["a", "dead"]
    copies = Copies()
    with structlog.testing.capture_logs() as lines:
        await copies.add("g0", "on a")
        await copies.add("g1", "on a")
    assert [line["event"] for line in lines] == ["groups_have_one_copy"]
    assert cluster.holders == {}


@pytest.mark.parametrize("fault", [ActorDiedError(), ActorUnschedulableError("no such node")])
async def test_a_host_that_dies_is_passed_over_and_tried_again_later(cluster, fault):
    cluster.faults["driver"] = fault
    copies = Copies()
    await copies.add("g0", "on a")
    assert cluster.held() == {"b": ["g0"]}
    del cluster.faults["driver"]
    await copies.add("g1", "on a")
    assert cluster.held() == {"b": ["g0"], "driver": ["g1"]}


async def test_a_message_that_is_lost_or_does_not_come_is_left_to_its_reader(cluster, monkeypatch):
    cluster.faults["driver"] = RayTaskError("hold", "traceback", ObjectLostError("00", None, ""))
    copies = Copies()
    await copies.add("g0", "on a")
    assert (cluster.held(), copies._hosts, list(cluster.holders)) == ({}, {}, ["driver"])
    monkeypatch.setattr(timeouts, "PAYLOAD_S", 0.01)
    cluster.holders["driver"].hold = SimpleNamespace(remote=lambda *_: asyncio.sleep(3600))
    await copies.add("g1", "on a")
    assert copies._hosts == {}


async def test_a_message_that_comes_after_it_was_dropped_is_not_held():
    holder, coming = CopyHolder(), asyncio.get_running_loop().create_future()
    holding = asyncio.ensure_future(holder.hold("g", [coming]))
    await asyncio.sleep(0)
    await holder.drop(["g"])
    coming.set_result(b"message")
    await holding
    assert holder._held == {}


class QueueAnswers:
    """The queue's actor, which keeps every second group and forgets all that it is asked to."""

    def __init__(self):
        self.puts = 0

    def __getattr__(self, name):
        async def call(*arguments):
            if name != "put_many":
                return ["g0"] if name == "advance" else None
            self.puts += 1
            return [self.puts % 2 == 1]

        return SimpleNamespace(remote=call)


async def test_a_copy_is_there_before_the_queue_has_the_group_and_goes_with_it(cluster):
    actor, copies = QueueAnswers(), Copies()
    client = QueueClient(actor, None, copies)
    held_at_put = []

    def put_many(batch):
        held_at_put.extend(cluster.held().values())
        return QueueAnswers.__getattr__(actor, "put_many").remote(batch)

    actor.put_many = SimpleNamespace(remote=put_many)
    assert await client.put_stored(GroupMeta("g0", 1, 1, 0, 0, 1, 0), ["on a"])
    assert held_at_put == [["g0"]]
    assert not await client.put_stored(GroupMeta("g1", 1, 1, 0, 0, 1, 0), ["on a"]), "dropped: it was stale"
    await asyncio.sleep(0)
    assert list(copies._hosts) == ["g0"]
    await client.advance(3)
    await asyncio.sleep(0)
    assert cluster.held() == copies._hosts == {}
