"""Where copies of finished groups are made, and what follows when a host is lost. Ray is a stand-in here.

``tests/cluster/test_host_loss.py`` has the real one.
"""

import asyncio
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from ray.exceptions import ActorDiedError, ActorUnschedulableError, ObjectLostError, RayTaskError

from async_rl.queue import copies as copies_module
from async_rl.queue import fetcher
from async_rl.queue.client import QueueClient
from async_rl.queue.copies import Copies, CopyHolder
from async_rl.queue.records import GroupMeta
from async_rl.runtime import timeouts


class Cluster:
    """Hosts with their object stores. A message is a name; ``places`` has the hosts that hold it."""

    def __init__(self, *hosts):
        self.hosts = {host: {"CPU": 2.0} for host in hosts}
        self.places, self.faults, self.asked, self.errors = {}, {}, [], set()
        self.sizes, self.unplaced = {}, Counter()  # {message: how often Ray does not know its place yet}
        self.messages = Counter()
        self.holders_started = Counter()

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "driver")

    @property
    def experimental(self):
        def location(name):
            known = self.unplaced[name] <= 0
            self.unplaced[name] -= 1
            return {"node_ids": self.places[name] if known else [], "object_size": self.sizes.get(name, 0)}

        def locations(references):
            return {each: location(each) for each in references if each in self.places}

        return SimpleNamespace(get_local_object_locations=locations)  # no other process is asked

    def nodes(self):
        alive = [{"NodeID": host, "Alive": True, "Resources": resources} for host, resources in self.hosts.items()]
        return [*alive, {"NodeID": "long dead", "Alive": False, "Resources": {"CPU": 2.0}}]

    def start_holder(self, host):
        self.holders_started[host] += 1

        def remote(source):
            (reference,) = source
            self.asked.append(host)
            self.messages[reference] += 1
            copy = f"{reference} copied to {host} {self.messages[reference]}"

            async def size():
                if reference in self.errors:
                    raise RayTaskError("copy", "traceback", ObjectLostError("00", None, ""))
                if (fault := self.faults.get(host)) is not None:
                    raise fault
                self.places[copy] = [host]
                self.places[reference] = [*self.places[reference], host]  # as Ray brings it there
                return 10

            return copy, asyncio.ensure_future(size())

        def options(num_returns):
            assert num_returns == 2
            return SimpleNamespace(remote=remote)

        return SimpleNamespace(copy=SimpleNamespace(options=options))

    def lose(self, host):
        """Take a host away. Of a value that is lost, Ray has the error in the store of its owner, the driver."""
        del self.hosts[host]
        self.errors |= {name for name, hosts in self.places.items() if hosts == [host]}
        left = {name: [each for each in hosts if each != host] for name, hosts in self.places.items()}
        self.places = left | {name: ["driver"] for name in self.errors}

    def spill(self):
        """Write everything to disk, of which Ray then names no place."""
        self.places = {name: [] for name in self.places}

    def made_on(self, host, *names):
        self.places |= {name: [host] for name in names}
        return {name: [name] for name in names}

    def hosts_of(self, payload):
        return [self.places[reference] for reference in payload]


@pytest.fixture
def cluster(monkeypatch):
    found = Cluster("driver", "a", "b", "c")
    found.hosts["without code"] = {"memory": 1.0}
    monkeypatch.setattr(copies_module, "ray", found)
    monkeypatch.setattr(fetcher, "ray", found)
    monkeypatch.setattr(copies_module, "_start_holder", found.start_holder)
    monkeypatch.setattr(copies_module, "_HOSTS_VALID_S", 0.0)
    return found


async def test_copies_are_spread_over_the_other_hosts_of_the_run(cluster):
    copies, payloads = Copies("cpu"), cluster.made_on("a", *map(str, range(100)))
    for name, payload in payloads.items():
        await copies.add(name, payload)
        assert payload == [name, f"{name} copied to {cluster.asked[-1]} 1"]
    held = Counter(cluster.asked)
    assert set(held) == {"b", "c"}, "not the driver's, whose links carry nothing that grows with tokens"
    assert min(held.values()) > 20
    assert cluster.holders_started == {"b": 1, "c": 1}


async def test_the_drivers_host_has_the_copies_where_there_is_no_other(cluster):
    del cluster.hosts["b"], cluster.hosts["c"]
    payload = cluster.made_on("a", "g")["g"]
    await Copies("cpu").add("g", payload)
    assert cluster.hosts_of(payload)[1] == ["driver"]


async def test_on_gpus_copies_go_to_hosts_with_some(cluster):
    cluster.hosts |= {"a": {"GPU": 8.0}, "c": {"GPU": 8.0}}
    payload = cluster.made_on("a", "g")["g"]
    await Copies("cuda").add("g", payload)
    assert cluster.hosts_of(payload)[1] == ["c"]


@pytest.mark.parametrize("places", [["driver"], [], ["long dead"]])
async def test_nothing_is_copied_that_only_the_drivers_death_can_lose_or_that_is_lost(cluster, places):
    """Ray names no place for a small message, which is in the driver's process."""
    cluster.places["g"], payload = places, ["g"]
    await Copies("cpu").add("g", payload)
    await Copies("cpu").add("unknown", ["unknown"])
    assert (payload, cluster.asked) == (["g"], [])


@pytest.mark.parametrize(("size", "copied"), [(10**6, True), (1000, False)])
async def test_a_large_message_whose_place_ray_does_not_know_yet_is_copied(cluster, size, copied):
    """Ray knows the size of a message that has just come, and its place some milliseconds later."""
    payload = cluster.made_on("a", "g")["g"]
    cluster.sizes["g"], cluster.unplaced["g"] = size, 3
    await Copies("cpu").add("g", payload)
    assert (len(payload) == 2) == copied


async def test_a_large_message_that_is_lost_is_not_waited_for_without_end(cluster, monkeypatch):
    monkeypatch.setattr(copies_module, "_PLACED_S", 0.05)
    cluster.places["g"], cluster.sizes["g"], payload = [], 10**6, ["g"]
    await asyncio.wait_for(Copies("cpu").add("g", payload), 10)
    assert (payload, cluster.asked) == (["g"], [])


async def test_what_readers_have_of_a_message_for_a_while_is_no_copy(cluster):
    cluster.places["g"], payload = ["a", "b"], ["g"]
    await Copies("cpu").add("g", payload)
    assert cluster.hosts_of(payload)[1] == ["c"]


@pytest.mark.parametrize("fault", [ActorDiedError(), ActorUnschedulableError("no such node")])
async def test_a_host_whose_holder_dies_is_asked_last_for_a_while(cluster, fault, monkeypatch):
    cluster.faults["b"] = fault
    copies, payloads = Copies("cpu"), cluster.made_on("a", *map(str, range(30)))
    with structlog.testing.capture_logs() as lines:
        for name, payload in payloads.items():
            await copies.add(name, payload)
            assert cluster.hosts_of(payload)[1] == ["c"]
    assert cluster.asked.count("b") == 1
    assert [(line["event"], line["host"]) for line in lines] == [("copy_holder_died", "b")]
    del cluster.faults["b"]
    monkeypatch.setattr(copies_module.time, "monotonic", lambda: 1e9)
    for name, payload in cluster.made_on("a", *map(str, range(100, 130))).items():
        await copies.add(name, payload)
    assert cluster.asked.count("b") > 1
    assert cluster.holders_started["b"] == 2


async def test_where_no_host_takes_it_the_group_has_one_copy_and_the_log_says_so(cluster):
    cluster.faults |= dict.fromkeys(cluster.hosts, ActorDiedError())
    payload = cluster.made_on("a", "g")["g"]
    with structlog.testing.capture_logs() as lines:
        await Copies("cpu").add("g", payload)
    assert payload == ["g"]
    assert sorted(cluster.asked) == ["b", "c", "driver"]
    assert cluster.asked[-1] == "driver"
    assert {key: lines[-1][key] for key in ("event", "group", "log_level")} == {
        "event": "group_not_copied",
        "group": "g",
        "log_level": "warning",
    }


async def test_a_message_that_is_lost_is_left_to_its_reader(cluster):
    cluster.faults |= dict.fromkeys(cluster.hosts, RayTaskError("copy", "traceback", ObjectLostError("00", None, "")))
    await assert_left_alone(cluster, Copies("cpu"), "ObjectLostError")
    assert len(cluster.asked) == 1, "no other host would get it either"


async def test_a_message_that_does_not_come_is_left_to_its_reader(cluster, monkeypatch):
    monkeypatch.setattr(timeouts, "PAYLOAD_S", 0.01)
    copies, never = Copies("cpu"), asyncio.get_running_loop().create_future()
    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: ("copy", never)))
    copies._holders = dict.fromkeys(cluster.hosts, SimpleNamespace(copy=options))
    await assert_left_alone(cluster, copies, "within 0.01 s")
    (slow,) = copies._avoided
    assert copies._in_order(frozenset({slow, "driver"})) == ["driver", slow]


async def assert_left_alone(cluster, copies, reason):
    payload = cluster.made_on("a", "g")["g"]
    with structlog.testing.capture_logs() as lines:
        await copies.add("g", payload)
    assert payload == ["g"]
    assert [(line["event"], line["group"]) for line in lines] == [("group_not_copied", "g")]
    assert reason in lines[0]["reason"]


async def test_after_each_of_two_losses_every_group_has_two_hosts_again(cluster):
    """The first loss takes the messages, the second the copies that they were copied from."""
    copies, payloads = Copies("cpu"), cluster.made_on("a", *map(str, range(20)))
    payloads |= cluster.made_on("driver", "safe") | {"in redis": "1-0"}
    await copies.add_all(payloads)
    with structlog.testing.capture_logs() as lines:
        await copies._renew()
        assert lines == [], "no host is lost"
        for lost in ("a", "b"):
            cluster.lose(lost)
            await copies._renew()
            await copies._renew()  # nothing is left to do
            for name in map(str, range(20)):
                assert len(payloads[name]) == 2
                assert cluster.errors.isdisjoint(payloads[name]), "what is lost is let go"
                assert len(set().union(*cluster.hosts_of(payloads[name]))) > 1
    assert [(line["event"], line["hosts"], line["groups"] == line["copied"] == 20) for line in lines] == [
        ("copies_lost", 1, True),
        ("copies_lost", 1, True),
    ]
    assert (payloads["safe"], payloads["in redis"]) == (["safe"], "1-0")


@pytest.mark.parametrize("spilled", [False, True])
async def test_what_was_copied_to_a_lost_host_is_copied_again_from_where_it_was_made(cluster, spilled):
    copies, payloads = Copies("cpu"), cluster.made_on("a", *map(str, range(20)))
    copies._random.seed(0)
    await copies.add_all(payloads)
    on_b = {name: payload[1] for name, payload in payloads.items() if "copied to b" in payload[1]}
    if spilled:
        cluster.spill()
    cluster.lose("b")
    with structlog.testing.capture_logs() as lines:
        await copies._renew()
    assert 0 < len(on_b) < 20
    assert [(line["event"], line["groups"], line["copied"]) for line in lines] == [
        ("copies_lost", len(on_b), len(on_b))
    ]
    for name, payload in payloads.items():
        made = 2 if name in on_b else 1
        assert payload == [name, f"{name} copied to c {made}"]


@pytest.mark.parametrize("fault", [ActorDiedError(), ValueError("of any kind"), TimeoutError()])
async def test_where_no_copy_can_be_made_again_the_group_keeps_one_and_is_left_alone(cluster, fault):
    copies, payloads = Copies("cpu"), cluster.made_on("a", "g", "h")
    await copies.add_all(payloads)
    before = {name: list(payload) for name, payload in payloads.items()}
    cluster.lose("a")
    cluster.faults |= dict.fromkeys(cluster.hosts, fault)
    with structlog.testing.capture_logs() as lines:
        await copies._renew()
        cluster.faults.clear()
        await copies._renew()
    assert payloads == before
    lines = [line for line in lines if line["event"] != "copy_holder_died"]
    assert [line["event"] for line in lines] == ["group_not_copied", "group_not_copied", "copies_lost"]
    assert (lines[-1]["groups"], lines[-1]["copied"]) == (2, 0)
    assert copies._kept == {}


async def test_a_group_whose_hosts_are_both_lost_is_left_to_its_reader_and_one_on_the_drivers_host_has_enough(cluster):
    copies, payloads = Copies("cpu"), cluster.made_on("a", "g")
    await copies.add_all(payloads)
    del cluster.hosts["b"], cluster.hosts["c"]
    other = cluster.made_on("a", "h")["h"]
    await copies.add("h", other)
    assert cluster.hosts_of(other)[1] == ["driver"]
    asked = list(cluster.asked)
    cluster.lose("a")
    with structlog.testing.capture_logs() as lines:
        await copies._renew()
    assert (cluster.asked, lines, copies._kept) == (asked, [], {})


async def test_a_group_that_ends_while_it_is_copied_again_is_let_go(cluster):
    client = QueueClient(QueueAnswers(cluster, [meta("g")]), None, copies := Copies("cpu"))
    payload = cluster.made_on("a", "g")["g"]
    assert await client.put_stored(meta("g"), payload)
    before = list(payload)
    cluster.lose("a")
    renewing = asyncio.ensure_future(copies._renew())
    while len(cluster.asked) < 2:
        await asyncio.sleep(0)
    await client.ack(["g"])
    await renewing
    assert (copies._kept, payload) == ({}, before)


async def test_lost_copies_are_made_again_by_themselves_for_as_long_as_there_are_any(cluster, monkeypatch):
    monkeypatch.setattr(copies_module, "_PERIOD_S", 0.001)
    client = QueueClient(QueueAnswers(cluster, [meta("g")]), None, copies := Copies("cpu"))
    payload = cluster.made_on("a", "g")["g"]
    assert await client.put_stored(meta("g"), payload)
    lost = payload[0]
    cluster.lose("a")
    async with asyncio.timeout(10):
        while lost in payload:
            await asyncio.sleep(0.001)
        await client.ack(["g"])
        await copies._watching
    assert await client.put_stored(meta("next"), cluster.made_on("b", "next")["next"])
    assert not copies._watching.done()
    await client.return_group("next", "of the test")
    await asyncio.wait_for(copies._watching, 10)


async def test_a_group_that_is_put_twice_is_copied_again_as_it_was_put_first(cluster):
    copies, (first, second) = Copies("cpu"), (cluster.made_on("a", name)[name] for name in ("one", "two"))
    await copies.add("g", first)
    await copies.add("g", second)
    assert copies._kept["g"].payload is first


async def test_while_ray_does_not_say_which_hosts_there_are_those_of_before_are(cluster, monkeypatch):
    monkeypatch.setattr(timeouts, "ANSWER_S", 0.01)
    copies, payloads = Copies("cpu"), cluster.made_on("a", "g", "h", "i")
    await copies.add("g", payloads["g"])
    calls, silent, nodes = [], threading.Event(), cluster.nodes
    monkeypatch.setattr(cluster, "nodes", lambda: calls.append(1) or (silent.wait(10) and nodes()))
    async with asyncio.timeout(5):
        await copies.add("h", payloads["h"])
        await copies._renew()
    assert (len(payloads["h"]), len(calls)) == (2, 1), "no second thread waits"
    silent.set()
    while copies._looking is not None:
        await asyncio.sleep(0.001)

    def fails():
        raise RuntimeError("the head is out of reach")

    monkeypatch.setattr(cluster, "nodes", fails)
    with structlog.testing.capture_logs() as lines:
        await copies.add("i", payloads["i"])
    assert len(payloads["i"]) == 2
    assert {line["event"] for line in lines} == {"hosts_not_seen"}


async def test_concurrent_callers_look_at_the_hosts_once(cluster, monkeypatch):
    monkeypatch.setattr(copies_module, "_HOSTS_VALID_S", 60.0)
    looked, nodes = [], cluster.nodes
    monkeypatch.setattr(cluster, "nodes", lambda: looked.append(1) or nodes())
    copies, payloads = Copies("cpu"), cluster.made_on("a", *"12345678")
    await asyncio.gather(*(copies.add(name, payload) for name, payload in payloads.items()))
    assert {len(payload) for payload in payloads.values()} == {2}
    assert len(looked) == 1


async def test_a_holder_returns_the_message_and_its_size():
    future = asyncio.get_running_loop().create_future()
    future.set_result(np.arange(5, dtype=np.uint8))
    message, size = await CopyHolder().copy([future])
    assert (message.tolist(), size) == ([0, 1, 2, 3, 4], 5)


async def test_a_holder_stops_waiting_for_a_message(monkeypatch):
    monkeypatch.setattr(timeouts, "PAYLOAD_S", 0.01)
    copying = asyncio.ensure_future(CopyHolder().copy([asyncio.get_running_loop().create_future()]))
    await asyncio.wait({copying}, timeout=5)
    assert isinstance(copying.exception(), TimeoutError)


class QueueAnswers:
    """The queue's actor: keeps the groups that it is given; ``leased`` are those of its state."""

    def __init__(self, cluster, leased=()):
        self.cluster, self.leased, self.at_put = cluster, leased, []

    def __getattr__(self, name):
        async def call(*arguments):
            if name == "put_many":
                self.at_put.append(list(self.cluster.asked))
                return [True for _ in arguments[-1]]
            if name == "state":
                return {"queued": [], "leased": [[None, meta.to_fields()] for meta in self.leased]}
            return list(self.leased) if name == "lease" else []

        return SimpleNamespace(remote=call)


def meta(name):
    return GroupMeta(name, 1, 1, 0, 0, 1, 0)


async def test_a_copy_exists_before_the_queue_has_the_group_and_goes_with_it(cluster):
    actor = QueueAnswers(cluster, [meta("g")])
    client = QueueClient(actor, None, Copies("cpu"))
    payload = cluster.made_on("a", "g")["g"]
    assert await client.put_stored(meta("g"), payload)
    assert len(actor.at_put[0]) == 1, "copied first"
    ((_, leased),) = await client.lease("trainer", 1)
    assert leased == ["g", f"g copied to {cluster.asked[0]} 1"]
    await client.ack(["g"])
    assert client._payloads == {}


async def test_groups_of_a_checkpoint_are_copied_once_they_are_loaded(cluster):
    client = QueueClient(QueueAnswers(cluster, [meta("g"), meta("of no file")]), None, Copies("cpu"))
    client.hold("g", cluster.made_on("b", "g")["g"])
    await client.recover(1)
    assert len(client.payload("g")) == 2


async def test_without_copies_nothing_is_asked(cluster):
    client = QueueClient(QueueAnswers(cluster, [meta("g")]))
    assert await client.put_stored(meta("g"), payload := cluster.made_on("a", "g")["g"])
    client.hold("h", cluster.made_on("a", "h")["h"])
    await client.recover(1)
    assert (payload, cluster.asked) == (["g"], [])
