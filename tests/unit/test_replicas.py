"""ReplicaSupervisor against scripted workers: what is saved of one that dies, and when its successor has weights."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

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
        self.adopted, self.started, self.salvages = [], False, 0
        self.killed = asyncio.Event()

    async def start(self):
        self.started = True

    async def groups(self):
        if self.error is None:
            await self.killed.wait()
            raise ActorDiedError()
        elif isinstance(self.error, BaseException):
            raise self.error
        for item in ():
            yield item

    def accepted(self, group_id):
        raise AssertionError("its stream has no groups")

    async def salvage(self):
        self.salvages += 1
        if self.dead:
            raise ActorDiedError()
        await asyncio.sleep(0.01)
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
        self.workers[replica].killed.set()

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


class Sync:
    """Has every worker as a member; ``fails`` are the replicas that fail to join."""

    def __init__(self, rollouts):
        self.members = dict(rollouts.workers)
        self.joined, self.fails = [], []

    async def join(self, replica, version):
        if replica in self.fails:
            self.fails.remove(replica)
            raise ReplicaFailed(replica, "its canary disagrees")
        self.joined.append((replica, version))


def supervisor(*workers):
    rollouts, queue, recovery, recorder = Rollouts(*workers), Queue(), Recovery(), Recorder()
    sync = Sync(rollouts)
    return ReplicaSupervisor(rollouts, queue, sync, recovery, recorder), rollouts, sync, recovery, recorder


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_a_worker_whose_engine_died_hands_its_groups_to_its_successor_which_joins_at_the_current_version():
    subject, rollouts, sync, recovery, recorder = supervisor(
        Worker(EngineDied("it crashed"), groups=("a", "gone")), Worker()
    )
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: rollouts.workers[0].adopted)
    assert 0 not in sync.members, "it has no weights yet"
    assert rollouts.workers[0].started
    assert rollouts.workers[0].adopted == ["a"], "the queue has ended the other one"
    assert recovery.waits == [("rollout-0", {"reissued": 1, "resumed": 2})]
    assert recorder.events == []
    await subject.admit(7)
    assert sync.joined == [(0, 7)], "the other one has version 7 and is not paused for it"
    assert sync.members[0] is rollouts.workers[0]
    await until(lambda: recorder.events)
    assert recorder.events == [("worker_restarted", {"replica": "rollout-0"})]
    await subject.admit(7)
    assert sync.joined == [(0, 7)], "it waits no longer"
    task.cancel()


async def test_a_restarted_worker_takes_part_in_a_sync_that_comes_first():
    subject, rollouts, sync, _, recorder = supervisor(Worker(ActorDiedError(), dead=True), Worker())
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: rollouts.workers[0].started)
    await until(lambda: subject._waiting)
    await subject.add_waiting_members()
    assert sync.members[0] is rollouts.workers[0]
    subject.on_sync_done()
    await until(lambda: recorder.events)
    assert sync.joined == []
    task.cancel()


async def test_of_a_worker_that_is_dead_itself_nothing_is_resumed():
    subject, rollouts, _, recovery, _ = supervisor(Worker(ActorDiedError(), groups=("a",), dead=True))
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: rollouts.workers[0].started)
    assert rollouts.workers[0].adopted == []
    assert recovery.waits == [("rollout-0", {"reissued": 2, "resumed": 0})]
    task.cancel()


async def test_an_evicted_replica_is_ended_once_and_its_groups_are_kept_for_its_successor():
    subject, rollouts, sync, recovery, _ = supervisor(Worker(groups=("a", "b")), Worker())
    first = rollouts.workers[0]
    task = asyncio.ensure_future(subject.supervise(0))
    await asyncio.sleep(0)
    subject.evict(ReplicaFailed(0, "it hangs"))
    subject.evict(ReplicaFailed(0, "it hangs"))  # found twice
    assert list(sync.members) == [1]
    await until(lambda: rollouts.workers[0].adopted)
    assert list(rollouts.workers[0].adopted) == ["a", "b"]
    assert first.salvages == 1
    assert rollouts.killed == [0]
    assert recovery.waits == [("rollout-0", {"reissued": 0, "resumed": 2})]
    # It fails again as it joins.
    sync.fails = [0]
    await until(lambda: subject._waiting)
    await subject.admit(3)
    await until(lambda: len(recovery.waits) == 2)
    await until(lambda: subject._waiting)
    assert list(rollouts.workers[0].adopted) == ["a", "b"]
    assert rollouts.killed == [0, 0]
    await subject.admit(3)
    assert sync.joined == [(0, 3)]
    task.cancel()


async def test_a_replica_that_was_evicted_while_nothing_supervised_it_is_replaced():
    subject, rollouts, _, recovery, _ = supervisor(Worker(groups=("a",)))
    subject.evict(ReplicaFailed(0, "it hangs"))  # in the first evaluation
    task = asyncio.ensure_future(subject.supervise(0))
    await until(lambda: rollouts.workers[0].adopted)
    assert recovery.waits == [("rollout-0", {"reissued": 1, "resumed": 1})]
    task.cancel()


async def test_an_engine_that_dies_while_it_is_evicted_is_replaced_once():
    worker = Worker(groups=("a",))
    subject, rollouts, _, recovery, _ = supervisor(worker)
    task = asyncio.ensure_future(subject.supervise(0))
    await asyncio.sleep(0)
    subject.evict(ReplicaFailed(0, "it hangs"))
    worker.killed.set()  # its stream ends while its groups are saved
    await until(lambda: rollouts.workers[0].adopted)
    await asyncio.sleep(0.05)
    assert (worker.salvages, rollouts.killed, len(recovery.waits)) == (1, [0], 1)
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


@pytest.mark.parametrize("cause", [ObjectLostError("00", None, ""), ActorDiedError()])
async def test_saved_groups_that_are_lost_with_their_host_are_issued_again(cause):
    subject, rollouts, *_ = supervisor(Worker(EngineDied("it crashed"), groups=("a", "b")))
    task = asyncio.ensure_future(subject.supervise(0))

    def successor(replica):
        async def adopt(_):
            raise RayTaskError("adopt", "traceback", cause).as_instanceof_cause()

        rollouts.workers[replica] = Worker()
        rollouts.workers[replica].adopt = adopt
        return rollouts.workers[replica]

    rollouts.replace = successor
    await until(lambda: subject._waiting)
    assert subject._queue.lost == [("rollout-0", ["a", "b"]), ("rollout-0", [])]
    assert rollouts.workers[0].started
    await subject.admit(1)
    task.cancel()
