"""ReplicaSupervisor against scripted workers: what is saved of one that dies, and when its successor has weights."""

import asyncio
import contextlib

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from async_rl.config.rollouts import ReplicaRange
from async_rl.driver.fleet import Fleet
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.errors import AsyncRLError, ConfigError, EngineDied, EngineError, ReplicaFailed


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

    async def placed(self, replica):
        pass

    async def has_left(self, replica, error):
        return False

    async def until_gone(self, replica):
        await asyncio.Event().wait()


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
    def __init__(self, least, most):
        self.waits = []
        self.fleet = Fleet(ReplicaRange(min=least, max=most), least, 1800.0)

    async def wait(self, process, error, **consequence):
        self.waits.append((process, consequence))

    def moved(self, worker, state):
        self.fleet.move(worker, state, 0.0)

    async def watch(self):
        await asyncio.Event().wait()


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
    rollouts, queue, recorder = Rollouts(*workers), Queue(), Recorder()
    recovery = Recovery(len(workers), len(workers))
    sync = Sync(rollouts)
    return ReplicaSupervisor(rollouts, queue, sync, recovery, recorder), rollouts, sync, recovery, recorder


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


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


class Hosts(Rollouts):
    """Workers that run where there is a host for them: as many as ``host_of`` has entries, one replica each."""

    def __init__(self, *hosts):
        super().__init__()
        self.free, self.host_of, self.asked = list(hosts), {}, []
        self.moved = asyncio.Condition()
        self.starts = {}  # what a start of a replica awaits

    async def placed(self, replica):
        if replica not in self.host_of:
            self.asked.append(replica)
            async with self.moved:
                await self.moved.wait_for(lambda: self.free)
                self.host_of[replica] = self.free.pop(0)

    def replace(self, replica):
        worker = super().replace(replica)
        if replica in self.starts:
            worker.start = self.starts.pop(replica)
        return worker

    async def has_left(self, replica, error):
        return self.host_of.get(replica, "gone") == "gone"

    async def until_gone(self, replica):
        async with self.moved:
            await self.moved.wait_for(lambda: self.host_of[replica] == "gone")

    def remove(self, replica):
        del self.workers[replica], self.host_of[replica]

    async def come(self, host):
        async with self.moved:
            self.free.append(host)
            self.moved.notify_all()

    async def go(self, host):
        """Take a host away, with the worker there."""
        async with self.moved:
            (replica,) = [replica for replica, there in self.host_of.items() if there == host]
            self.host_of[replica] = "gone"
            self.workers[replica].killed.set()
            self.moved.notify_all()
        return replica


@contextlib.asynccontextmanager
async def elastic(least, most, *hosts):
    """Yield a supervisor, its parts, and its waits for the start. Its replicas are ended with the block."""
    rollouts, queue, recovery, recorder = Hosts(*hosts), Queue(), Recovery(least, most), Recorder()
    sync = Sync(rollouts)
    subject = ReplicaSupervisor(rollouts, queue, sync, recovery, recorder)
    try:
        yield subject, rollouts, sync, recovery, recorder, subject.starting()
    finally:
        subject.close()
        await asyncio.gather(*subject._lives, return_exceptions=True)


def train(subject):
    subject.begin()
    return [asyncio.ensure_future(each) for each in subject.training()]


async def test_a_run_begins_with_the_fewest_replicas_and_takes_in_each_further_one_alone():
    async with elastic(2, 4, "a") as (subject, rollouts, sync, _, recorder, starting):
        assert list(starting) == ["2 of 4 rollout workers"]
        begun = asyncio.ensure_future(starting["2 of 4 rollout workers"])
        await until(lambda: rollouts.host_of)
        await asyncio.sleep(0.01)
        assert not begun.done(), "one is too few"
        await rollouts.come("b")
        await asyncio.wait_for(begun, 5)
        train(subject)
        assert sorted(sync.members) == [0, 1]
        await rollouts.come("c")
        await until(lambda: 2 in subject._waiting)
        assert sorted(sync.members) == [0, 1], "it has no weights yet"
        await subject.admit(5)
        assert sync.joined == [(2, 5)]
        await until(lambda: recorder.events)
        assert recorder.events == [("replica_joined", {"replica": "rollout-2", "working": 3})]
        assert sorted(rollouts.asked) == [0, 1, 2, 3], "the last one still waits for a host"


async def test_a_replica_that_leaves_with_its_host_is_asked_for_again_and_no_restart_is_counted():
    async with elastic(1, 2, "a", "b") as (subject, rollouts, sync, recovery, recorder, starting):
        await asyncio.gather(*starting.values())
        train(subject)
        await subject.admit(0)
        await until(lambda: recovery.fleet.counts["working"] == 2)
        recorder.events.clear()
        left = await rollouts.go("b")
        await until(lambda: recorder.events)
        name = f"rollout-{left}"
        ((event, fields),) = recorder.events
        assert event == "replica_left"
        assert fields.pop("reason").startswith("ActorDiedError: ")
        assert fields == {"replica": name, "others": 1, "reissued": 4}
        assert subject._queue.lost == [(name, []), (name, [])], "no group in flight is kept for it"
        assert (recovery.waits, recovery.fleet.counts["waiting"]) == ([], 1)
        assert left not in sync.members
        await rollouts.come("another")
        await until(lambda: left in subject._waiting)
        await subject.admit(3)
        await until(lambda: len(recorder.events) == 2)
        assert recorder.events[1] == ("replica_joined", {"replica": name, "working": 2})
        assert sync.joined[-1] == (left, 3)


@pytest.mark.parametrize("when", ["starts", "waits"])
async def test_a_host_that_goes_before_its_replica_has_weights_is_not_waited_for(when):
    async with elastic(1, 2, "a") as (subject, rollouts, sync, recovery, _, starting):
        await asyncio.gather(*starting.values())
        train(subject)
        if when == "starts":
            rollouts.starts[1] = asyncio.Event().wait  # a worker that is created on a host that is gone never answers
        await rollouts.come("b")
        await until(lambda: 1 in rollouts.workers)
        if when == "waits":
            await until(lambda: 1 in subject._waiting)
        assert await rollouts.go("b") == 1
        await until(lambda: recovery.fleet.counts["waiting"] == 1)
        assert (sorted(sync.members), subject._waiting, recovery.waits) == ([0], {}, [])
        await rollouts.come("c")
        await until(lambda: 1 in subject._waiting)
        await subject.admit(1)
        await until(lambda: recovery.fleet.counts["working"] == 2)


async def test_a_host_that_goes_while_its_replica_is_given_weights_is_no_member_of_the_next_sync():
    async with elastic(1, 2, "a") as (subject, rollouts, sync, recovery, _, starting):
        await asyncio.gather(*starting.values())
        train(subject)
        left, joining, may_end = [], asyncio.Event(), asyncio.Event()

        async def join(replica, version):
            left.append(replica)
            joining.set()
            await may_end.wait()

        sync.join = join
        await rollouts.come("b")
        await until(lambda: subject._waiting)
        admitting = asyncio.ensure_future(subject.admit(1))
        await joining.wait()
        await rollouts.go(rollouts.host_of[left[0]])
        await until(lambda: recovery.fleet.counts["waiting"] == 1)
        assert left[0] not in sync.members
        may_end.set()
        await admitting
        assert left[0] not in sync.members


async def test_a_host_that_goes_before_the_run_begins_is_waited_for():
    async with elastic(1, 1, "a") as (_, rollouts, *_, starting):
        rollouts.starts[0] = asyncio.Event().wait
        (begun,) = map(asyncio.ensure_future, starting.values())
        await until(lambda: 0 in rollouts.workers)
        await rollouts.go("a")
        await rollouts.come("b")
        await asyncio.wait_for(begun, 5)
        assert rollouts.host_of == {0: "b"}


async def test_an_engine_that_cannot_start_ends_the_start_of_a_run():
    async with elastic(1, 3) as (_, rollouts, *_, starting):

        async def fails():
            raise EngineError("rollout.max_num_seqs is too large")

        rollouts.starts = dict.fromkeys(range(3), fails)
        begun = [asyncio.ensure_future(wait) for wait in starting.values()]
        await rollouts.come("a")
        with pytest.raises(EngineError, match="too large"):
            await asyncio.gather(*begun)


async def test_later_it_is_restarted_like_one_that_died():
    async with elastic(1, 2, "a") as (subject, rollouts, _, recovery, _, starting):
        await asyncio.gather(*starting.values())
        subject.begin()

        async def fails():
            raise EngineError("the GPU is in use")

        rollouts.starts[1] = fails
        await rollouts.come("b")
        await until(lambda: 1 in subject._waiting)
        assert recovery.waits == [("rollout-1", {"reissued": 2, "resumed": 0})]
        await subject.admit(1)


async def test_a_fixed_number_of_replicas_is_named_one_by_one_and_all_are_waited_for():
    subject, *_ = supervisor(Worker(), Worker())
    starting = subject.starting()
    assert list(starting) == ["rollout-0", "rollout-1"]
    await asyncio.wait_for(asyncio.gather(*starting.values()), 5)
    assert sorted(subject._waiting) == [0, 1]
    subject.close()


@contextlib.asynccontextmanager
async def broken(*replicas, of, needed=1, error=None):
    """Yield a supervisor of a fixed number of replicas, of which some do not start at the first try, and its parts."""
    subject, rollouts, sync, recovery, recorder = supervisor(*(Worker() for _ in range(of)))
    sync.members.clear()
    recovery.fleet.needed = needed
    fails = set(replicas)

    def replace(replica):
        worker = Rollouts.replace(rollouts, replica)
        if replica in fails:
            fails.discard(replica)

            async def start():
                raise error or EngineError(f"replica {replica}: uncorrectable ECC error")

            worker.start = start
        return worker

    rollouts.replace = replace
    try:
        yield subject, rollouts, sync, recovery, recorder
    finally:
        subject.close()
        await asyncio.gather(*subject._lives, return_exceptions=True)


async def test_a_run_begins_without_a_replica_that_does_not_start_and_tries_it_again():
    async with broken(1, of=3) as (subject, rollouts, sync, recovery, recorder):
        await asyncio.wait_for(asyncio.gather(*subject.starting().values()), 5)
        assert recorder.events == [
            (
                "replica_not_started",
                {"replica": "rollout-1", "others": 2, "reason": "EngineError: replica 1: uncorrectable ECC error"},
            )
        ]
        assert rollouts.killed == [1]
        await asyncio.sleep(0.01)
        assert recovery.waits == [], "the run comes first"
        train(subject)
        assert sorted(sync.members) == [0, 2]
        await until(lambda: 1 in subject._waiting)
        assert recovery.waits == [("rollout-1", {"reissued": 2, "resumed": 0})]
        await subject.admit(4)
        assert sync.joined == [(1, 4)]


@pytest.mark.parametrize(
    ("replicas", "of", "needed", "error"),
    [
        ([0], 1, 1, None),
        ([0, 1, 2], 3, 1, None),  # settings with which no engine starts
        ([1], 3, 3, None),  # all are needed
        ([0, 1], 3, 2, None),
        ([1], 3, 1, ConfigError("uncorrectable ECC error")),  # which no further try changes
    ],
)
async def test_a_run_with_too_few_engines_that_start_does_not_begin(replicas, of, needed, error):
    async with broken(*replicas, of=of, needed=needed, error=error) as (subject, *_):
        with pytest.raises(AsyncRLError, match="ECC error"):
            await asyncio.wait_for(asyncio.gather(*subject.starting().values()), 5)
