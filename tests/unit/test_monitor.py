"""The monitor of a run without Ray: what it counts as progress, and when it ends the run."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError

from async_rl.config.loading import validate
from async_rl.driver import monitor as monitor_module
from async_rl.driver.monitor import Monitor
from async_rl.errors import NothingToLearn, TooManyFailures
from tests.support.queue_parts import make_broker, meta


class Parts:
    """Queue, workers, sync and recorder in one."""

    def __init__(self):
        self.broker = make_broker(window_limit=1000, max_groups=1000)
        self.queue, self.silent, self.workers, self.members = None, [], {}, {}
        self.computed = []
        self.events = []

    async def stats(self, *_):
        return self.broker.stats() if not _ else []

    def update_counts(self, queue, workers, snapshot):
        self.queue = queue
        self.computed.append(snapshot.computed)
        return 0.0

    def end(self, *, trained=0, failed=0, filtered=0):
        tickets = self.broker.issue("w", trained + failed + filtered)
        for ticket in tickets[:failed]:
            self.broker.fail(ticket.group_id, "reward")
        for ticket in tickets[failed : failed + filtered]:
            self.broker.filter_group(ticket.group_id, "zero_variance")
        for ticket in tickets[failed + filtered :]:
            self.broker.put(meta(ticket))
            self.broker.ack([group.group_id for group in self.broker.lease(1, "trainer")], 1)

    def event(self, name, **fields):
        self.events.append((name, fields))

    def training_loop_at(self, phase):
        """Publish nothing."""

    def record_phase(self, *_):
        """Record nothing."""


def monitor(parts, monkeypatch, **rollout):
    monkeypatch.setattr(monitor_module, "_PERIOD_S", 0.0)
    config = validate({"model": {"path": "m"}, "data": {"train": "d"}, "rollout": rollout})
    return Monitor(config, parts, parts, None, parts, parts)


async def test_a_run_ends_when_more_of_its_last_groups_fail_than_allowed(monkeypatch):
    parts = Parts()
    subject = monitor(parts, monkeypatch, max_failed_ratio=0.25)
    await subject.poll()
    subject._check_failures()
    parts.end(trained=75, failed=25)
    await subject.poll()
    subject._check_failures()  # as many as allowed
    parts.end(failed=1)
    with pytest.raises(
        TooManyFailures, match=r"more than rollout\.max_failed_ratio = 0\.25 of the last .*26 by reward.*group_failed"
    ):
        await asyncio.wait_for(subject.run(), 5)


async def test_a_run_whose_groups_are_almost_all_filtered_says_so_and_ends_if_that_lasts(monkeypatch):
    parts = Parts()
    subject = monitor(parts, monkeypatch, filter={"zero_variance": True, "max_share": 0.9})

    async def at(now):
        await subject.poll()
        subject._check_filtered(now)

    subject._check_filtered(0.0)  # before the first count
    await at(0.0)
    parts.end(trained=20, filtered=180)
    await at(10.0)
    assert parts.events == [], "as many as allowed"
    parts.end(filtered=1)
    await at(20.0)
    said = {"limit": 0.9, "abort_s": 1800.0, "reasons": "181 by zero_variance"}
    assert parts.events == [("groups_filtered", said)]
    parts.end(trained=3)
    await at(1500.0)
    parts.end(filtered=200)
    await at(1600.0)
    await at(1600.0 + 1799.0)
    assert len(parts.events) == 2, "once each time"
    with pytest.raises(
        NothingToLearn, match=r"rollout\.filter\.max_share = 0\.9 of the last 200 .* 1800 s .*381 by zero"
    ):
        await at(1600.0 + 1800.0)


async def test_filtered_groups_have_not_failed(monkeypatch):
    parts = Parts()
    subject = monitor(parts, monkeypatch, max_failed_ratio=0.25)
    await subject.poll()
    subject._check_failures()
    parts.end(trained=40, filtered=60, failed=30)
    await subject.poll()
    subject._check_failures()


async def test_each_part_of_a_step_that_the_trainer_computes_is_progress(monkeypatch):
    parts = Parts()
    subject = monitor(parts, monkeypatch)
    await subject.poll()
    for phase in ("groups", "update", "groups", "update", "push"):
        with subject.phase(phase, 1):
            await subject.poll()
    assert parts.computed == [0, 0, 1, 1, 2, 2]


async def test_the_last_counts_of_a_run_are_taken_unless_its_actors_are_gone(monkeypatch):
    monkeypatch.setattr("async_rl.runtime.timeouts.ANSWER_S", 0.05)
    parts = Parts()
    subject = monitor(parts, monkeypatch)
    parts.end(trained=2)
    await subject.last_poll()
    assert parts.queue.counts.trained == 2

    async def gone(*_):
        raise ActorDiedError()

    async def hangs(*_):
        await asyncio.Event().wait()

    for answer in (gone, hangs):
        parts.stats = answer
        await asyncio.wait_for(subject.last_poll(), 5)
