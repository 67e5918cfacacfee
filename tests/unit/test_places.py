"""What an elastic run asks Ray for, and when: against placement groups that a script places."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest
import structlog

from async_rl.config.loading import validate
from async_rl.driver import places
from async_rl.driver.hosts import Survey
from async_rl.driver.places import Places
from tests.unit.test_doctor_cluster import host as doctored
from tests.unit.test_replicas import until


class Ray:
    """Placement groups in the order in which they were asked for. The test places them, and takes hosts away."""

    def __init__(self, *hosts):
        self.hosts = list(hosts)
        self.asked, self.removed = [], []
        self.util = SimpleNamespace(
            placement_group=self.ask,
            remove_placement_group=self.remove,
            placement_group_table=lambda group: group.table,
        )

    def nodes(self):
        return [{"NodeID": host, "Alive": True, "Resources": {"GPU": 8.0}} for host in self.hosts]

    def available_resources(self):
        return {"GPU": 1.0}

    def ask(self, bundles, strategy, bundle_label_selector=None):
        self.asked.append(Group(bundles, strategy))
        self.asked[-1].selectors = bundle_label_selector
        return self.asked[-1]

    def remove(self, group):
        self.removed.append(group)

    @property
    def waiting(self):
        return [group for group in self.asked if group not in self.removed and group.table["state"] != "CREATED"]


class Group:
    def __init__(self, bundles, strategy):
        self.strategy = strategy
        self.created = asyncio.Event()
        self.table = {"state": "PENDING", "bundles": dict(enumerate(bundles))}

    async def ready(self):
        await self.created.wait()

    def place(self, *hosts):
        """Place the bundles on these hosts in turn, or all on one."""
        on = dict(zip(self.table["bundles"], itertools.cycle(hosts), strict=False))
        self.table |= {"state": "CREATED", "bundles_to_node_id": on}
        self.created.set()

    def lose(self):
        self.table["state"] = "RESCHEDULING"
        self.created.clear()


@pytest.fixture
def ray(monkeypatch):
    fake = Ray("a", "b")
    monkeypatch.setattr(places, "ray", fake)
    return fake


def make(replicas, address="10.0.0.1:6379", parts=1, **resources):
    tree = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "rollout": {"replicas": replicas, "tensor_parallel_size": 8 * parts, "hosts_per_engine": parts},
        "trainer": {"parallel": {"dp": 8}},
        "resources": {"device": "cuda"} | resources,
        "cluster": {"address": address},
    }
    subject = Places(validate(tree))
    if subject._groups:
        subject._newcomers._survey = lambda config, only: Survey([doctored(2)], doctored(1))  # each has everything
    return subject


async def started(ray, subject, *hosts):
    """Place what is reserved: the trainer, then the first replicas."""
    waits = asyncio.gather(*subject.reserved().values())
    for group, host in zip(list(ray.asked), hosts, strict=True):
        group.place(host)
    await asyncio.wait_for(waits, 5)


def placing(subject, *replicas):
    return [asyncio.ensure_future(subject.placed(replica)) for replica in replicas]


async def test_the_trainer_and_the_first_replicas_are_asked_for_and_the_others_once_those_have_a_place(ray):
    subject = make({"min": 1, "max": 4})
    assert list(subject._groups) == ["trainer", "rollout-0"]
    lives = placing(subject, 0, 1, 2, 3)
    await asyncio.sleep(0.01)
    assert len(ray.asked) == 2, "no other may take the trainer's host"
    await started(ray, subject, "a", "b")
    await until(lambda: lives[0].done())
    assert len(ray.asked) == 5, "what waits for a host is asked for all the while"
    ray.waiting[1].place("c")
    await until(lambda: lives[2].done())
    assert [life.done() for life in lives] == [True, False, True, False]
    assert subject._hosts["rollout-2"] == ["c"]
    subject.release()
    assert ray.waiting == [], "nothing is left in the cluster"
    for life in lives:
        life.cancel()


async def test_a_replica_whose_host_is_gone_gets_another_group(ray):
    subject = make({"min": 1, "max": 1})
    await started(ray, subject, "a", "b")
    await subject.placed(0)
    first = ray.asked[1]
    assert not await subject.has_left(0, RuntimeError())
    subject._watch._alive = alive("a")
    assert await subject.has_left(0, RuntimeError())
    subject.give_up(0)
    assert ray.removed == [first], "Ray would try it without a pause, and no other"
    (life,) = placing(subject, 0)
    await until(lambda: ray.waiting)
    ray.waiting[0].place("c")
    await asyncio.wait_for(life, 5)
    assert subject._hosts["rollout-0"] == ["c"]


async def test_while_the_trainer_has_no_place_no_replica_may_take_the_next_host(ray):
    subject = make({"min": 1, "max": 3})
    await started(ray, subject, "a", "b")
    lives = placing(subject, 1, 2)
    await until(lambda: len(ray.waiting) == 2)
    pending, trainer = list(ray.waiting), ray.asked[0]
    trainer.lose()
    restarting = asyncio.ensure_future(subject.of_trainer())
    await until(lambda: ray.removed == pending)
    assert ray.waiting == [trainer]
    trainer.place("c")
    assert len(await restarting) == 8
    await until(lambda: len(ray.waiting) == 2)
    assert not any(life.done() for life in lives)
    for life in lives:
        life.cancel()


async def test_a_host_that_joins_and_lacks_something_gets_no_replica(ray):
    subject = make({"min": 1, "max": 3})
    reports = {"c": doctored(2, python="3.12.1"), "d": doctored(3)}
    subject._newcomers._survey = lambda config, only: Survey([reports[each] for each in only], doctored(1))
    await started(ray, subject, "a", "b")
    lives = placing(subject, 0, 1, 2)
    await until(lambda: lives[0].done() and len(ray.waiting) == 2)
    refused = list(ray.waiting)
    assert [group.selectors for group in ray.asked[1:]] == [None, None, None]
    with structlog.testing.capture_logs() as lines:
        for group in refused:
            group.place("c")
        # In either order: one of the two has the host checked, and may see the result after the other.
        await until(lambda: len(ray.removed) == len(ray.waiting) == 2)
        assert all(group in ray.removed for group in refused)
    assert [line["host"] for line in lines if line["event"] == "host_unfit"] == ["10.0.0.2"]
    assert [group.selectors for group in ray.waiting] == [[{"ray.io/node-id": "!in(c)"}]] * 2
    assert [life.done() for life in lives] == [True, False, False]
    ray.waiting[0].place("d")
    await until(lambda: sum(life.done() for life in lives) == 2)
    for life in lives:
        life.cancel()


async def test_a_trainer_that_is_restarted_at_its_place_changes_nothing_for_what_waits(ray):
    subject = make({"min": 1, "max": 2})
    await started(ray, subject, "a", "b")
    (life,) = placing(subject, 1)
    await until(lambda: ray.waiting)
    await subject.of_trainer()
    assert (len(ray.waiting), ray.removed) == (1, [])
    life.cancel()


async def test_a_fixed_number_of_replicas_is_reserved_at_once_and_never_given_up(ray):
    subject = make(3)
    assert list(subject._groups) == ["trainer", "rollout-0", "rollout-1", "rollout-2"]
    await started(ray, subject, "a", "b", "c", "d")
    await asyncio.gather(*placing(subject, 0, 1, 2))
    subject._watch._alive = alive()
    assert not await subject.has_left(0, RuntimeError())
    assert len(ray.asked) == 4


async def test_an_elastic_run_has_groups_on_one_host_too(ray, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    subject = make({"min": 1, "max": 2}, address=None)
    assert (subject.one_host, len(ray.asked)) == (True, 2)
    assert make(2, address=None).reserved() == {}


async def test_a_replica_on_another_host_has_cores_that_are_free_there(ray):
    subject = make({"min": 2, "max": 3}, device="cpu")
    await started(ray, subject, "a", "a", "b")
    places_of_ranks = await subject.of_trainer()
    assert [place.cores.first for place in places_of_ranks] == list(range(1, 9))
    assert [subject.of_replica(replica)[0].cores.first for replica in (0, 1)] == [0, 0]
    subject.give_up(1)
    (life,) = placing(subject, 1)
    await until(lambda: ray.waiting)
    ray.waiting[0].place("a")
    await life
    assert subject.of_replica(1)[0].cores.first == 9, "not those that a rank has"
    assert subject.of_replica(0)[0].cores.first == 0


async def test_the_parts_of_an_engine_are_on_different_hosts_and_it_is_gone_with_any_of_them(ray):
    subject = make({"min": 1, "max": 2}, parts=2)
    (life,) = placing(subject, 1)
    waits = asyncio.gather(*subject.reserved().values())
    trainer, first = ray.asked
    trainer.place("a")
    first.place("b", "c")
    await asyncio.wait_for(waits, 5)
    assert (first.strategy, first.table["bundles"]) == ("STRICT_SPREAD", {0: {"GPU": 8.0}, 1: {"GPU": 8.0}})
    bundles = [place.options["scheduling_strategy"].placement_group_bundle_index for place in subject.of_replica(0)]
    assert bundles == [0, 1], "the worker is on the first"
    await until(lambda: ray.waiting)
    ray.waiting[0].place("c", "d")
    await asyncio.wait_for(life, 5)
    assert subject._hosts["rollout-1"] == ["c", "d"]
    assert not await subject.has_left(1, RuntimeError())
    subject._watch._alive = alive("a", "b", "c")
    assert not await subject.has_left(0, RuntimeError())
    assert await subject.has_left(1, RuntimeError())
    await asyncio.wait_for(subject.until_gone(1), 10)


def alive(*hosts):
    async def alive():
        return hosts

    return alive
