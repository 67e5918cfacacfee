"""Checkpointer against scripted parts: what a moment of the run holds, and which version a restored run has."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from async_rl.config.loading import validate
from async_rl.driver import checkpoint, run_state
from async_rl.driver.checkpoint import Checkpointer
from async_rl.driver.run_state import RunState
from async_rl.errors import ReplicaFailed
from async_rl.weights.canary import Noise

CONFIG = validate({"model": {"path": "m"}, "data": {"train": "t"}})


class Parts:
    """Everything that a Checkpointer calls, and the order in which it did."""

    def __init__(self, version=0, newest=0, in_flight=()):
        self.calls, self.members = [], {0: None, 1: None}
        self.workers, self.fails, self.version, self.newest = {0: None, 1: None}, [], version, newest
        self.in_flight = in_flight
        self.reported = []
        self.canary = SimpleNamespace(noise=None)

    # queue
    def hold(self, group_id, payload):
        self.calls.append(f"hold {group_id}")

    async def recover(self, step):
        return self.newest

    async def adopt(self, worker, groups):
        self.calls.append(f"{worker} has {sorted(groups)}")
        return list(groups)

    async def worker_lost(self, worker, keep=()):
        self.calls.append(f"{worker} is lost")

    async def stats(self):
        return SimpleNamespace(version=self.version, in_flight={"rollout-7": 1}, queued_groups=1)

    async def advance(self, version):
        self.calls.append(f"advance {version}")

    async def state(self):
        return {"queued": [[["a", 1], 0], [["acked meanwhile", 1], 0]]}

    def payload(self, group_id):
        return ["reference"] if group_id == "a" else None

    # sync
    async def run(self, version):
        self.calls.append(f"sync {version}")

    async def resume(self):
        self.calls.append("resume")

    async def while_paused(self, paused):
        if self.fails:
            raise self.fails.pop()
        for replica in self.members:
            await paused(replica)

    async def on(self, replica, call):
        return await call(SimpleNamespace(snapshot=lambda: self.snapshot(replica)))

    async def snapshot(self, replica):
        return {f"of {replica}": b""}

    # replicas
    async def hand_over(self, replica, groups):
        return list(groups)

    def evict(self, error):
        self.calls.append(f"evict {error.replica}")
        del self.members[error.replica]

    # monitor, recorder
    @contextlib.contextmanager
    def phase(self, name, step):
        self.calls.append(f"phase {name}")
        yield

    def event(self, event, **fields):
        self.reported.append((event, fields))


def checkpointer(parts):
    names = ("queue", "rollouts", "trainers", "sync", "replicas", "monitor", "recorder")
    return Checkpointer(CONFIG, **dict.fromkeys(names, parts))


def saved(monkeypatch, **fields):
    """A checkpoint after step 6 at version 5."""
    defaults = {"queue": {}, "recorder": {}, "queued": {"q": b"x"}, "in_flight": {"a": b"", "b": b"", "c": b""}}
    state = RunState(**({"step": 6, "version": 5, "synced": True} | defaults | fields))
    monkeypatch.setattr(run_state, "read", lambda _: state)
    monkeypatch.setattr(checkpoint.ray, "put", lambda _: "reference")


@pytest.mark.parametrize(
    ("synced", "queue", "newest", "version"),
    [
        (True, 5, 0, 5),  # the weights of the checkpoint are those of its version
        (False, 5, 0, 6),  # they are newer: a step without a weight sync
        (True, 8, 0, 9),  # a queue that outlived the run has seen versions whose weights are lost
        (True, 5, 7, 8),
    ],
)
async def test_a_version_never_stands_for_two_weights(monkeypatch, synced, queue, newest, version):
    saved(monkeypatch, synced=synced)
    parts = Parts(version=queue, newest=newest)
    assert await checkpointer(parts).restore(Path("unused")) == version
    assert f"sync {version}" in parts.calls
    assert (f"advance {version}" in parts.calls) == (version > queue)
    assert parts.calls[-1] == "resume"


async def test_the_canarys_calibration_is_that_of_the_run_and_not_of_its_restore(monkeypatch):
    """The engines of a restored run have other weights than its trainer until the first sync."""
    parts = Parts(version=5)
    parts.canary.noise = Noise("bfloat16", 0.7, 0.08)
    taken = await checkpointer(parts).take(6, 5, {}, synced=True)
    parts.canary.noise = None
    noise_at_sync = []

    async def run(version):
        noise_at_sync.append(parts.canary.noise)

    parts.run = run
    saved(monkeypatch, canary=taken.canary)
    await checkpointer(parts).restore(Path("unused"))
    assert noise_at_sync == [Noise("bfloat16", 0.7, 0.08)]


async def test_groups_in_flight_are_spread_over_the_replicas_before_other_workers_are_given_up(monkeypatch):
    saved(monkeypatch)
    parts = Parts(version=5)
    await checkpointer(parts).restore(Path("unused"))
    assert parts.calls[:4] == [
        "hold q",
        "rollout-0 has ['a', 'c']",
        "rollout-1 has ['b']",
        "rollout-7 is lost",
    ]
    assert parts.reported == [("work_restored", {"step": 6, "queued": 1, "resumed": 3})]


async def test_a_replica_that_fails_is_evicted_and_the_moment_taken_without_it():
    parts = Parts()
    parts.fails = [ReplicaFailed(1, "it hangs")]
    state = await checkpointer(parts).pause_and_take(6, 5, synced=False)
    assert parts.calls == ["phase checkpoint", "evict 1"]
    assert (state.step, state.version, state.synced) == (6, 5, False)
    assert state.in_flight == {"of 0": b""}
    assert state.queued == {"a": ["reference"]}, "a group without a payload is not queued any more"
