"""What a run has of the replicas that it asks for, and when they are too few, as hosts come and go in virtual time."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.rollouts import ReplicaRange
from async_rl.driver.fleet import STATES, Fleet
from tests.support.examples import examples
from tests.unit.test_replicas import elastic, train, until

PATIENCE_S = 100.0


def fleet(least=2, most=8, needed=None):
    return Fleet(ReplicaRange(min=least, max=most), needed or least, PATIENCE_S)


def move(subject, state, *replicas, now=0.0):
    for replica in replicas:
        subject.move(f"rollout-{replica}", state, now)


def test_all_wait_for_a_host_at_first():
    subject = fleet()
    assert subject.counts == {"waiting": 8, "starting": 0, "working": 0, "lost": 0}
    assert (subject.present, subject.patience_left_s(0.0)) == (0, None), "the start has a limit of its own"


def test_those_that_start_are_there_and_those_that_are_lost_or_wait_are_not():
    subject = fleet()
    move(subject, "starting", 0, 1, 2)
    move(subject, "working", 0)
    move(subject, "lost", 2)
    assert subject.present == 2
    assert [subject.others(f"rollout-{replica}") for replica in (0, 1, 2, 3)] == [1, 1, 2, 2]


def test_a_run_has_too_few_replicas_for_so_long_only():
    subject = fleet()
    move(subject, "working", 0, 1, 2)
    subject.begin(10.0)
    move(subject, "waiting", 0, now=20.0)
    assert subject.patience_left_s(1000.0) is None, "two are enough"
    move(subject, "waiting", 1, now=1000.0)
    assert subject.patience_left_s(1040.0) == 60.0
    move(subject, "waiting", 2, now=1050.0)
    assert subject.patience_left_s(1060.0) == 40.0, "it is counted from the first that was missing"
    move(subject, "starting", 4, 5, now=1090.0)
    assert subject.patience_left_s(1200.0) is None
    move(subject, "waiting", 4, now=1300.0)
    assert subject.patience_left_s(1300.0) == PATIENCE_S, "and again from the next one"


def test_fewer_than_it_starts_with_may_be_enough():
    subject = fleet(least=4, needed=1)
    move(subject, "working", 0, 1, 2, 3)
    subject.begin(0.0)
    move(subject, "waiting", 0, 1, 2, now=1.0)
    assert subject.patience_left_s(1e6) is None
    move(subject, "waiting", 3, now=2.0)
    assert subject.patience_left_s(2.0) == PATIENCE_S


@given(
    most=st.integers(1, 40), needed=st.integers(1, 5), seed=st.integers(0, 10**6), mean_s=st.sampled_from([1.0, 60.0])
)
@settings(max_examples=examples(100), deadline=None)
def test_after_any_arrivals_and_departures_the_counts_are_right_and_the_limit_is_of_the_last_shortage(
    most, needed, seed, mean_s
):
    chance, now, states, short_since = random.Random(seed), 0.0, ["waiting"] * most, 0.0
    needed = min(needed, most)
    subject = fleet(needed, most)
    subject.begin(now)
    for _ in range(300):
        now += chance.expovariate(1 / mean_s)
        replica, state = chance.randrange(most), chance.choice(STATES)
        states[replica] = state
        move(subject, state, replica, now=now)
        present = sum(state in ("starting", "working") for state in states)
        short_since = None if present >= needed else now if short_since is None else short_since
        assert subject.counts == {state: Counter(states)[state] for state in STATES}
        assert subject.present == present
        expected = None if short_since is None else short_since + PATIENCE_S - now
        assert subject.patience_left_s(now) == expected


@pytest.mark.parametrize("seed", range(3))
async def test_hundreds_of_replicas_come_and_go_with_64_hosts_and_each_that_is_there_gets_weights_once(seed):
    """The supervisor with hosts that are names: no replica waits for a host that is gone, or has two."""
    chance, hosts = random.Random(seed), [f"host-{number}" for number in range(64)]
    away, serial = [], len(hosts)
    async with elastic(8, 96, *hosts) as (subject, rollouts, sync, recovery, recorder, starting):
        for wait in starting.values():
            await wait
        running = train(subject)
        for version in range(60):
            for _ in range(chance.randrange(12)):
                there = [host for host in rollouts.host_of.values() if host != "gone"]
                if there and (not away or chance.random() < 0.5):
                    away.append(chance.choice(there))
                    await rollouts.go(away[-1])
                else:
                    away.pop()
                    serial += 1
                    await rollouts.come(f"host-{serial}")
            expected = 64 - len(away)
            await until(lambda: "gone" not in rollouts.host_of.values())
            await until(lambda expected=expected: recovery.fleet.present == expected)
            # As the training loop does: an engine that starts meanwhile waits for the next time.
            async with asyncio.timeout(60):
                while len(sync.members) != expected:
                    await subject.admit(version)
                    await asyncio.sleep(0.001)
            assert set(sync.members) == set(rollouts.host_of), "a replica that is there works, and no other"
            assert len(set(rollouts.host_of.values())) == expected, "each on a host of its own"
        assert recovery.waits == [], "no restart was counted"
        left = sum(name == "replica_left" for name, _ in recorder.events)
        assert left > 100
        assert len(rollouts.asked) == 96 + left, "each departure asks once"
        for task in running:
            assert not task.done()
            task.cancel()
