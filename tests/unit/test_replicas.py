"""ReplicaSupervisor against scripted workers: what is saved of one that dies, and when its successor has weights."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.errors import AsyncRLError, EngineDied, ReplicaFailed


def value(of):
    """What a reference of Ray's is: something to await."""
    reference = asyncio.get_running_loop().create_future()
    reference.set_result(of)
    return reference


class Worker:
    """Dies with ``error`` once its stream is read to the end, or ends it; ``groups`` are its groups in flight."""

    def __init__(self, error=None, groups=(), dead=False):
        self.error, self.in_flight, self.dead = error, groups, dead
        self.adopted, self.started = [], False

    async def start(self):
        self.started = True

    async def groups(self):
        if self.error is None:
            await asyncio.sleep(3600)
        elif isinstance(self.error, BaseException):
            raise self.error
        for item in ():
            yield item

    def accepted(self, group_id):
        raise AssertionError("its stream has no groups")

    async def salvage(self):
        if self.dead:
            raise ActorDiedError()
        for group in self.in_flight:
            yield value(group)
            yield f"message of {group}"

    async def stats(self):
        return None

    async def adopt(self, messages):
        self.adopted = [message.removeprefix("message of ") for message in messages]
        return self.adopted


class Rollouts:
    def __init__(self, *workers):
        self.workers = dict(enumerate(workers))
        self.killed = []

    def kill(self, replica):
        self.killed.append(replica)

    def replace(self, replica):
        self.workers[replica] = Worker()
        return self.workers[replica]


class Queue:
    """Has the groups "a" and "b" as in flight."""

    def __init__(self):
        self.lost = []

    async def worker_lost(self, worker, keep=()):
        self.lost.append((worker, list(keep)))
        return [group for group in ("a", "b") if group not in keep]

    async def adopt(self, worker, groups):
        return [group for group in groups if group in ("a", "b")]


class Recorder:
    def __init__(self):
        self.events = []

    def event(self, event, **fields):
        self.events.append((event, fields))


class Recovery:
    def __init__(self):
        self.waits = []

    async def wait(self, process, error, **consequence):
        self.waits.append((process, consequence))


def supervisor(*workers):
    rollouts, queue, recovery, recorder = Rollouts(*workers), Queue(), Recovery(), Recorder()
    sync = SimpleNamespace(members=dict(rollouts.workers))
    return ReplicaSupervisor(rollouts, queue, sync, recovery, recorder), rollouts, sync, recovery, recorder


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_a_worker_whose_engine_died_hands_its_groups_to_its_successor():
    subject, rollouts, sync, recovery, recorder = supervisor(Worker(EngineDied("it crashed"), groups=("a", "gone")))
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: subject.sync_requested)
    assert 0 not in sync.members, "it has no weights yet"
    assert rollouts.workers[0].started
    assert rollouts.workers[0].adopted == ["a"], "the queue has ended the other one"
    assert recovery.waits == [("rollout-0", {"reissued": 1, "resumed": 2})]
    assert recorder.events == []
    await subject.add_waiting_members()
    assert sync.members == {0: rollouts.workers[0]}
    subject.on_sync_done()
    await until(lambda: recorder.events)
    assert recorder.events == [("worker_restarted", {"replica": "rollout-0"})]
    assert not subject.sync_requested
    task.cancel()


async def test_of_a_worker_that_is_dead_itself_nothing_is_resumed():
    subject, rollouts, _, recovery, _ = supervisor(Worker(ActorDiedError(), groups=("a",), dead=True))
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: subject.sync_requested)
    assert rollouts.workers[0].adopted == []
    assert recovery.waits == [("rollout-0", {"reissued": 2, "resumed": 0})]
    task.cancel()


async def test_an_evicted_replica_is_ended_and_its_groups_are_kept_for_its_successor():
    subject, rollouts, sync, recovery, _ = supervisor(Worker(groups=("a", "b")), Worker())
    await subject.evict(ReplicaFailed(0, "it hangs"))
    assert rollouts.killed == [0]
    assert list(sync.members) == [1]
    rollouts.workers[0].error, rollouts.workers[0].dead = ActorDiedError(), True
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: subject.sync_requested)
    assert rollouts.workers[0].adopted == ["a", "b"]
    assert recovery.waits == [("rollout-0", {"reissued": 0, "resumed": 2})]
    # It fails again in the sync that was to give it weights.
    await subject.add_waiting_members()
    await subject.evict(ReplicaFailed(0, "it hangs again"))
    await until(lambda: len(recovery.waits) == 2)
    await until(lambda: subject.sync_requested)
    task.cancel()


async def test_a_sync_waits_for_a_member_when_there_is_none():
    subject, _, sync, _, _ = supervisor(Worker(ActorDiedError(), dead=True))
    sync.members.clear()
    waiting = asyncio.ensure_future(subject.add_waiting_members())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    task = asyncio.ensure_future(subject.supervise(0))
    await asyncio.wait_for(waiting, 5)
    assert list(sync.members) == [0]
    task.cancel()


async def test_a_worker_that_stops_early_ends_the_run():
    subject, *_ = supervisor(Worker(error="none"))
    with pytest.raises(AsyncRLError, match="rollout-0 stopped before the last training step"):
        await subject.supervise(0)
