"""Groups whose message is lost never reach a gradient, and never keep a training step from its groups."""

import dataclasses

import pytest

from async_rl.config.training import ParallelSection
from async_rl.driver.shares import batch_shares, rank_shares
from async_rl.errors import TrainerDied
from async_rl.metrics.records import GroupCounts
from tests.support.bare_loop import bare_loop
from tests.support.queue_parts import Source, make_broker, meta


def described(ticket):
    return dataclasses.replace(meta(ticket), lengths=(100,))


class Trainers:
    """The ranks of a data-parallel trainer, which cannot read the groups that are ``lost``."""

    def __init__(self, lost=(), fails_at=None):
        self.lost, self.fails_at = set(lost), fails_at
        self.fetched, self.computed, self.begun = [], [], 0

    async def fetch(self, shares):
        if len(self.fetched) == self.fails_at:
            raise TrainerDied("trainer-1 died during fetch")
        ids = [group_id for share in shares for batch in share for group_id in batch]
        self.fetched.append(ids)
        return [group_id for group_id in ids if group_id in self.lost]

    async def train_step(self, shares, version, oldest_version):
        self.computed = [[list(batch) for batch in share] for share in shares]
        return ["report"]

    async def accumulate(self, shares, version, oldest_version, *, first):
        if first:
            self.computed = []
            self.begun += 1
        self.computed.append([group_id for share in shares for batch in share for group_id in batch])

    async def finish_step(self):
        return "report"


class Queue:
    """The broker behind the client's interface, whose groups are finished at once."""

    def __init__(self, **settings):
        self.broker = make_broker(Source(), **settings)
        self.events = []

    async def lease(self, consumer, n, timeout_s, at_least):
        while not self.broker.can_lease(n, consumer, at_least):
            for ticket in self.broker.issue("w", 1):
                self.broker.put(described(ticket))
        return [(group, [f"reference of {group.group_id}"]) for group in self.broker.lease(n, consumer, at_least)]

    async def return_group(self, group_id, reason):
        self.broker.return_group(group_id, reason)

    async def release(self, group_ids):
        self.broker.release(group_ids)

    def event(self, name, **fields):
        self.events.append((name, fields))


def make_loop(trainers, *, groups=4, batches=1):
    queue = Queue(required_groups=groups * batches, window_limit=4 * groups * batches)
    return bare_loop(queue, trainers, queue, groups=groups, batches=batches, ranks=2), queue


async def test_invariant_5_a_step_takes_other_groups_for_those_that_are_lost():
    trainers = Trainers(lost=["0-2.0", "0-5.0"])
    loop, queue = make_loop(trainers)
    leased = []
    assert await loop._update(leased) == ["report"]
    assert [group.group_id for group, _ in leased] == ["0-1.0", "0-3.0", "0-4.0", "0-2.1"]
    assert sorted(group_id for share in trainers.computed for batch in share for group_id in batch) == sorted(
        group.group_id for group, _ in leased
    ), "the prompt of a lost group is issued again, as its next attempt"
    counts = queue.broker.counts()
    assert counts == GroupCounts(issued=5, trained=0, outstanding=4, returned=1, failed=0, dropped=1)
    assert queue.broker.stats().dropped == {"payload_lost": 1}
    assert queue.events == [("payloads_lost", {"groups": 1})]


async def test_every_group_of_a_step_of_several_mini_batches_is_read_before_one_is_computed():
    trainers = Trainers(lost=["0-1.0", "0-7.0", "0-8.0"])
    loop, queue = make_loop(trainers, batches=2)
    leased = []
    await loop._update(leased)
    assert sorted(trainers.fetched[-1]) == sorted(group.group_id for group, _ in leased)
    assert [[len(batch) for batch in share] for share in trainers.computed] == [[2, 2], [2, 2]]
    assert queue.broker.counts().returned == 3


@pytest.mark.parametrize("lost", [["0-1.0", "0-2.0"], ["0-1.0"], ["0-3.0"], ["0-1.0", "0-4.0", "0-1.1"]])
async def test_what_a_streaming_step_has_accumulated_stays_right(lost):
    trainers = Trainers(lost=lost)
    loop, queue = make_loop(trainers)
    leased = []
    await loop._streamed_update(leased)
    computed = [group_id for part in trainers.computed for group_id in part]
    assert sorted(computed) == sorted(group.group_id for group, _ in leased)
    assert len(computed) == 4
    assert not set(computed) & set(lost)
    assert trainers.begun == 1, "nothing that was computed is computed again"
    assert queue.broker.stats().dropped == {"payload_lost": len(lost)}


@pytest.mark.parametrize("streams", [True, False])
async def test_groups_of_a_step_whose_trainer_dies_as_it_reads_go_back(streams):
    trainers = Trainers(lost=["0-1.0"], fails_at=1)
    loop, queue = make_loop(trainers)
    leased = []
    with pytest.raises(TrainerDied):
        await (loop._streamed_update(leased) if streams else loop._update(leased))
    await queue.release([group.group_id for group, _ in leased])
    stats = queue.broker.stats()
    assert (stats.leased_groups, stats.counts.returned) == (0, 1)


def test_shares_are_by_rank_and_mini_batch():
    groups = [
        (described(ticket), ticket.group_id) for ticket in make_broker(window_limit=6, required_groups=6).issue("w", 6)
    ]
    shares = batch_shares(groups, 4, lambda batch: rank_shares(batch, ParallelSection(dp=2, tp=2), float))
    assert [[sorted(batch) for batch in share] for share in shares] == [
        *[[["0-1.0", "0-3.0"], ["0-5.0"]]] * 2,  # tensor-parallel neighbours have the same groups
        *[[["0-2.0", "0-4.0"], ["0-6.0"]]] * 2,
    ]
    assert all(group_id == item for share in shares for batch in share for group_id, item in batch.items())
