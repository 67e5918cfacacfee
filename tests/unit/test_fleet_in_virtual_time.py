"""The budget, the broker and the cursor under a whole fleet, in virtual time: invariants, and that it never stops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.simulation import Fleet


@given(
    replicas=st.integers(1, 6),
    capacity=st.integers(1, 6),
    required=st.integers(1, 8),
    trigger=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    max_staleness=st.integers(0, 3),
    on_stale=st.sampled_from(["mask", "drop"]),
    room=st.integers(0, 4),
    max_bytes=st.sampled_from([1, 3000, 10**12]),
    checkpoint_every=st.integers(1, 3),
    deaths=st.sampled_from([0.0, 0.1]),
    departures=st.sampled_from([0.0, 0.1]),
    trainer_deaths=st.sampled_from([0.0, 0.1]),
    never_finish=st.sampled_from([0.0, 0.1]),
    filtered=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=examples(60), deadline=None)
def test_no_schedule_loses_a_prompt_or_stops(required, room, **fleet):
    Fleet(required=required, max_groups=required + room, rows=37, **fleet).run(24)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_staleness": 0},
        {"max_staleness": 0, "on_stale": "drop"},
        {"threshold": 0.0},
        {"threshold": 0.0, "max_staleness": 0, "trigger": 3},
        {"threshold": 5.0, "max_staleness": 0, "on_stale": "drop"},  # at each push everything goes stale at once
        {"never_finish": 0.5},
    ],
)
def test_no_deadlock_at_the_edges(settings):
    fleet = Fleet(replicas=4, capacity=4, required=8, **settings)
    fleet.run(50)
    if settings.get("max_staleness") == 0 and settings.get("on_stale") == "drop":
        assert set(fleet.ages) == {0}
    if settings.get("threshold") == 0.0 and "trigger" not in settings:
        assert set(fleet.ages) == {0}, "synchronous training"


def test_responses_that_outgrow_the_queues_bytes_slow_a_run_down_and_do_not_end_it():
    """At first there is room for three steps' groups; at the end a step's have many times as many bytes."""
    fleet = Fleet(replicas=4, capacity=8, required=8, threshold=2.0, max_bytes=24_000)
    fleet.run(200)
    assert fleet.version > 100
    assert fleet.broker.stats().counts.trained == 8 * 200


def test_a_group_that_never_finishes_is_given_up():
    fleet = Fleet(replicas=2, capacity=8, required=2, never_finish=0.3)
    fleet.run(200)
    stats = fleet.broker.stats()
    assert set(stats.failed) == {"timeout"}
    assert stats.returned["timeout"] > stats.failed["timeout"] > 0


class TwoLengths(Fleet):
    """Responses to every tenth row take five weight syncs, those to the others a third of one."""

    def generate(self, replica, ticket):
        seconds = 5.0 if ticket.prompt.row % 10 == 0 else 0.3
        self.at(seconds, self.finish, replica, self.lives[replica], ticket, self.version)


@pytest.mark.parametrize("on_stale", ["mask", "drop"])
def test_rows_whose_responses_outlive_the_bound_are_trained_or_counted_as_given_up(on_stale):
    """With "drop", they come last in an epoch, when there is less beside them that makes them stale."""
    fleet = TwoLengths(
        replicas=4, capacity=4, required=4, threshold=1.0, max_staleness=1, on_stale=on_stale, max_groups=16, rows=60
    )
    fleet.run(250)
    stats = fleet.broker.stats()
    assert ("stale" in stats.dropped) == (on_stale == "drop")
    untrained = set(range(1, 61)) - {int(prompt.partition("-")[2]) for prompt in fleet.trained}
    assert len(untrained) <= stats.failed.get("stale", 0)


def test_a_hundred_replicas():
    """The fleet of tests/chaos/test_at_scale.py, a tenth as large and a fiftieth as long."""
    fleet = Fleet(replicas=100, capacity=8, required=400, checkpoint_every=5, deaths=1e-3, trainer_deaths=0.02)
    fleet.run(50)
    assert fleet.happened["die"] > 0


def test_replicas_that_come_and_go_with_their_hosts():
    """Half of the time, half of them are away."""
    fleet = Fleet(replicas=64, capacity=8, required=128, departures=0.05, checkpoint_every=5, trainer_deaths=0.02)
    fleet.run(60)
    assert fleet.happened["leave"] > 100
