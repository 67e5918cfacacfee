"""The clocks and counters of a run: idle shares, elapsed time, and what outlives a restore."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from async_rl.driver.step_record import RunMeter
from async_rl.metrics.publish import step_row
from async_rl.metrics.records import GroupCounts, SyncRecord
from async_rl.queue.records import GroupMeta
from tests.support.step_records import step_report


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


GROUPS = [
    GroupMeta(
        *("0-1.0", 50, 1, 0, 0, 2, 1, (15, 35), "", (1.0, 0.0), (10, 30), (1, 3), (0, 2), ("stop", "length")),
        *(("format", "right"), (0.5, 1.0), (2, 1), ("errors",), (4.0,), (2,)),
        *(("done", "truncated"), (1, 1), (1, 4), 0),
    ),
    GroupMeta(
        *("0-2.0", 25, 1, 0, 0, 1, 0, (25,), "", (0.5,), (20,), (1,), (0,), ("length",)),
        *(("format",), (1.0,), (1,), ("errors", "steps"), (2.0, 7.0), (1, 1)),
        *(("done",), (3,), (5,), 15),
    ),
]


def worker(replica, **counts):
    given = {"gone": False, "version": 3, "generated_tokens": 0, "resumed_prefill_tokens": 0, "busy_s": 0.0} | counts
    return SimpleNamespace(replica=replica, **given)


def queue(outstanding=5, **filtered):
    counts = GroupCounts(issued=9, trained=4, outstanding=outstanding)
    shares = {"math": 6, "code": 2}
    return SimpleNamespace(
        queued_groups=2, queued_bytes=2048, counts=counts, filtered=filtered, issued_by_source=shares
    )


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    meter = RunMeter(90.0, clock)
    meter.begin()
    return meter


def test_a_record_has_the_step_and_the_latest_counts(meter, clock):
    meter.count(queue(), [worker(0, busy_s=3.0), worker(1, version=2, busy_s=1.0)])
    sync = SyncRecord(policy_version=3, seconds=0.5)
    meter.synced(sync)
    clock.now += 4.0
    report = step_report(seconds={"forward": 0.5, "optimizer": 0.5})
    record = meter.record(7, 3, report, GROUPS, step_s=1.5)
    assert (record.step, record.policy_version, record.elapsed_s, record.step_s) == (7, 3, 4.0, 1.5)
    assert (record.reward_mean, record.groups, record.report, record.last_sync) == (0.5, 2, report, sync)
    assert (record.response_tokens, record.segments, record.interruptions) == ((10, 30, 20), (1, 3, 1), (0, 2, 0))
    assert (record.queue_groups, record.queue_bytes, record.groups_outstanding) == (2, 2048, 5)
    assert record.reward_parts == {"format": 0.5, "right": 1.0}, "means over the responses that have the part"
    assert record.rollout_metrics == {"errors": 2.0, "steps": 7.0}, "the same of metrics"
    assert step_row(record)["rollout_metric_mean"] == {"errors": 2.0, "steps": 7.0}
    assert (record.reward_by_source, record.issued_share) == ({}, {"code": 0.25, "math": 0.75})
    assert record.truncated == 2
    assert (record.rollout_ends, record.rollout_branches) == ({"done": 2, "truncated": 1}, (1, 1, 3))
    assert (record.rollout_turns, record.prefix_recomputed_share) == ((1, 4, 5), 15 / 75)
    row = step_row(record)
    assert (row["turns_per_rollout_mean"], row["turns_per_rollout_max"]) == (10 / 3, 5)
    assert (row["trajectories_per_rollout_mean"], row["prefix_recomputed_share"]) == (5 / 3, 0.2)
    assert row["rollouts_trained"] == {"done": 2, "truncated": 1}
    assert record.replica_versions == {0: 3, 1: 2}
    assert (record.rollout_idle_ratio, record.trainer_idle_ratio) == (0.5, 0.75)
    assert record.overlap_efficiency == 0.5, "rollout, the busier side, was busy for 2 of 4 s"


def test_rewards_are_also_those_of_each_source_which_the_groups_name(meter, clock):
    clock.now += 4.0
    groups = [replace(GROUPS[0], group_id="math/0-1.0"), replace(GROUPS[1], group_id="code/0-1.2")]
    row = step_row(meter.record(7, 3, step_report(), groups, step_s=1.5))
    assert (row["reward_mean"], row["reward_mean_by_source"]) == (0.5, {"code": 0.5, "math": 0.5})
    assert row["issued_share"] == {}


def test_idle_shares_are_of_the_last_step_only(meter, clock):
    meter.count(queue(), [worker(0, busy_s=4.0)])
    clock.now += 4.0
    meter.record(1, 0, step_report(), GROUPS, step_s=4.0)
    meter.count(queue(), [worker(0, busy_s=5.0)])
    clock.now += 4.0
    assert meter.record(2, 0, step_report(), GROUPS, step_s=4.0).rollout_idle_ratio == 0.75


def test_the_idle_share_is_that_of_the_replicas_that_there_are(meter, clock):
    """One replica joins, one leaves: what each has done before counts for its own time."""
    meter.count(queue(), [worker(0, busy_s=4.0)])
    clock.now += 4.0
    meter.record(1, 0, step_report(), GROUPS, step_s=4.0)
    meter.count(queue(), [worker(0, busy_s=8.0), worker(1, busy_s=2.0)])
    clock.now += 4.0
    record = meter.record(2, 0, step_report(), GROUPS, step_s=4.0)
    assert (record.rollout_idle_ratio, record.replica_versions) == (0.25, {0: 3, 1: 3})
    meter.count(queue(), [worker(0, busy_s=8.0, gone=True, version=0), worker(1, busy_s=5.0)])
    clock.now += 4.0
    record = meter.record(3, 0, step_report(), GROUPS, step_s=4.0)
    assert (record.rollout_idle_ratio, record.replica_versions) == (0.25, {1: 3})
    assert meter.totals().rollout_busy_s == 4.0 + 3.0 + 3.0


def test_filtered_groups_are_in_the_step_that_they_were_filtered_in(meter, clock):
    clock.now += 1.0
    found = []
    for counts in ({"function": 2}, {"function": 2}, {"function": 3, "mean_reward": 4}):
        meter.count(queue(**counts), [])
        found.append(meter.record(1, 0, step_report(), GROUPS, step_s=1.0).groups_filtered)
    assert found == [{"function": 2}, {}, {"function": 1, "mean_reward": 4}]
    restored = RunMeter(90.0, clock)
    restored.restore(meter.state())
    restored.begin()
    for _ in range(2):
        restored.count(queue(function=5), [])  # two of them while the run was restored
    clock.now += 1.0
    assert restored.record(1, 0, step_report(), GROUPS, step_s=1.0).groups_filtered == {}
    restored.count(queue(function=6), [])
    assert restored.record(2, 0, step_report(), GROUPS, step_s=1.0).groups_filtered == {"function": 1}


def test_an_evaluation_is_in_one_step_only(meter, clock):
    meter.evaluated({"set": "held_out", "avg": {"mean": 0.25}})
    clock.now += 1.0
    records = [meter.record(step, 0, step_report(), GROUPS, step_s=1.0) for step in (1, 2)]
    assert [record.eval_reward_mean for record in records] == [0.25, None]


def test_before_the_first_count_there_is_nothing(meter, clock):
    clock.now += 1.0
    record = meter.record(1, 0, step_report(), GROUPS, step_s=1.0)
    assert (record.queue_groups, record.groups_outstanding, record.replica_versions) == (0, 0, {})
    assert record.rollout_idle_ratio == 1.0


def test_the_wall_clock_runs_from_begin_to_end(clock):
    meter = RunMeter(90.0, clock)
    clock.now = 110.0
    assert (meter.training, meter.totals().wall_s, meter.totals().setup_s) == (False, 0.0, 20.0)
    meter.begin()
    clock.now = 115.0
    assert meter.training
    meter.end()
    clock.now = 200.0
    assert (meter.training, meter.totals().wall_s, meter.totals().setup_s) == (False, 5.0, 20.0)


def test_time_and_work_outlive_a_restore(meter, clock):
    meter.count(queue(), [worker(0, busy_s=2.0, generated_tokens=70, resumed_prefill_tokens=7)])
    clock.now += 10.0
    meter.record(1, 0, step_report(seconds={"forward": 3.0}), GROUPS, step_s=10.0)
    state = meter.state()

    other = RunMeter(clock.now, clock)
    other.restore(state)
    other.begin()
    other.count(queue(), [worker(0, busy_s=1.0, generated_tokens=5, resumed_prefill_tokens=1)])
    clock.now += 2.0
    record = other.record(2, 0, step_report(seconds={"forward": 1.0}), GROUPS, step_s=2.0)
    assert (record.elapsed_s, record.rollout_idle_ratio) == (12.0, 0.5)
    totals = other.totals()
    assert (totals.wall_s, totals.rollout_busy_s, totals.trainer_busy_s) == (12.0, 3.0, 4.0)
    assert (totals.tokens_generated, totals.tokens_resumed_prefill) == (75, 8)
