"""Which rollouts of agents begin: the pure policy, in virtual time, with tools and engines of every kind."""

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.rollout.admission import FIRST_CALL_S, Admission
from async_rl.rollout.engine.interface import EngineLoad


def begun(admission, *names, now=0.0, group="g"):
    """Rollouts that have made their first call, of a group that has no others."""
    admission.begin_group(group)
    for name in names:
        admission.begin(name, group, now)
        admission.call(name, name)
    admission.end_group(group)


def limits(places=4, limit=16, n=1, max_kv_use=0.9):
    return Admission(places, limit, n, max_kv_use)


def test_a_rollout_begins_for_each_place_that_no_call_wants():
    admission = limits()
    assert admission.room(0.0) == 4
    begun(admission, "a", "b", "c")
    assert admission.room(0.0) == 1
    admission.call("a", "a.1")  # a second one beside the first
    assert admission.room(0.0) == 0
    admission.answered("a", "a.1")
    admission.answered("b", "b")
    assert admission.room(0.0) == 2, "b waits for a tool"
    admission.call("b", "b")
    admission.call("b", "b")
    assert admission.room(0.0) == 1, "a call that was interrupted is no second one"
    admission.end("a")
    assert admission.room(0.0) == 2


def test_what_a_rollout_leaves_running_counts_for_nothing():
    admission = limits()
    begun(admission, "a")
    admission.end("a")
    admission.call("a", "a.1")
    admission.shares("a", 100)
    admission.holds("a", "a.1", 200)
    admission.answered("a", "a")
    admission.report(EngineLoad(kv_tokens=1000))
    assert (admission.room(0.0), admission.open, admission.kv_use) == (4, 0, 0.0)


def test_rollouts_that_wait_for_tools_count_to_the_limit():
    admission = limits(limit=6)
    begun(admission, *"abcd")
    for name in "abcd":
        admission.answered(name, name)
    assert admission.room(0.0) == 2


def test_a_rollout_without_a_call_has_a_place_for_a_while():
    admission = limits(places=2, limit=8)
    admission.begin_group("g")
    admission.begin("a", "g", 10.0)
    assert admission.room(10.0 + FIRST_CALL_S / 2) == 1
    assert admission.room(10.0 + FIRST_CALL_S) == 2
    admission.call("a", "a")
    assert admission.room(10.0 + FIRST_CALL_S) == 1


def test_no_rollout_begins_while_the_engine_has_calls_that_it_does_not_compute():
    admission = limits()
    begun(admission, "a")
    admission.report(EngineLoad(waiting=1, kv_use=0.1, kv_tokens=1000))
    assert (admission.room(0.0), admission.groups(0.0)) == (0, 0)
    admission.answered("a", "a")
    assert admission.room(0.0) == 4, "what was reported is of a call that has ended"
    admission.call("a", "a")
    admission.report(EngineLoad(waiting=0, kv_use=0.1, kv_tokens=1000))
    assert admission.room(0.0) == 3


def test_groups_are_taken_for_all_free_places_and_not_while_rollouts_are_to_begin():
    admission = limits(n=3)
    assert admission.groups(0.0) == 2, "one fits in part"
    admission.begin_group("g")
    assert (admission.groups(0.0), admission.room(0.0)) == (0, 4)
    admission.begin("g/0", "g", 0.0)
    admission.is_made("g")
    assert not admission.all_begun("g")
    admission.begin("g/2", "g", 0.0)
    assert admission.all_begun("g")
    assert admission.groups(0.0) == 1
    admission.begin_group("h")
    assert admission.groups(0.0) == 0
    admission.end_group("h")
    assert admission.groups(0.0) == 1, "its rollouts will not begin"


def test_what_rollouts_cache_counts_while_they_wait_for_tools():
    admission = limits()
    admission.report(EngineLoad(kv_tokens=1000))
    begun(admission, "a", "b")
    for name in "ab":
        admission.shares(name, 100)
        admission.holds(name, name, 250)
        admission.answered(name, name)
    assert admission.kv_use == pytest.approx(0.6), "the prompt counts once for the group"
    assert admission.groups(0.0) == 4
    admission.holds("b", "b.1", 300)
    assert (admission.kv_use, admission.groups(0.0)) == (pytest.approx(0.9), 0)
    assert admission.room(0.0) == 4, "groups that were taken have their room"
    admission.holds("b", "b.1", 250)
    assert admission.groups(0.0) == 0, "0.85 is not below nine tenths of the bound"
    admission.holds("b", "b.1", 200)
    assert admission.groups(0.0) == 4, "0.80 is"
    admission.end("a")
    admission.end("b")
    begun(admission, "c", group="h")
    assert admission.kv_use == pytest.approx(0.25 + (0.4375 - 0.25) / 8), "the prompt of g is gone"


def test_the_engine_s_own_figure_counts_where_it_is_more():
    admission = limits()
    begun(admission, "a")
    admission.report(EngineLoad(kv_use=0.95, kv_tokens=1000))
    assert (admission.kv_use, admission.groups(0.0)) == (0.95, 0)
    admission.report(EngineLoad(kv_use=0.85, kv_tokens=1000))
    assert admission.groups(0.0) == 0
    admission.report(EngineLoad(kv_use=0.8, kv_tokens=1000))
    assert admission.groups(0.0) == 3


def test_rollouts_are_expected_to_be_as_large_as_others_were():
    admission = limits(places=8, n=2, max_kv_use=1.0)
    admission.report(EngineLoad(kv_tokens=1500))
    begun(admission, "a")
    admission.holds("a", "a", 200)
    admission.holds("a", "a", 400)
    admission.end("a")
    assert admission.groups(0.0) == 2, "of four that have places"
    begun(admission, "b")
    assert admission.kv_use == pytest.approx(0.2)
    assert admission.groups(0.0) == 2
    admission.begin_group("h")
    assert admission.kv_use == pytest.approx(0.6), "with those to come"
    admission.begin("c", "h", 0.0)
    admission.begin("d", "h", 0.0)
    assert admission.groups(0.0) == 1


@pytest.mark.parametrize("load", [None, EngineLoad(waiting=9, kv_use=1.0, kv_tokens=10)])
def test_where_there_is_no_rollout_one_may_begin_whatever_the_engine_reports(load):
    admission = limits(places=2, limit=4, max_kv_use=0.5)
    begun(admission, "a")
    admission.holds("a", "a", 1000)
    admission.end("a")
    if load is not None:
        admission.report(load)
    assert admission.groups(0.0) >= 1
    admission.begin_group("h")
    assert admission.room(0.0) >= 1


# -- a replica in virtual time ----------------------------------------------------------------------------------------


@dataclass
class Plan:
    """A rollout: seconds before its first call; of each turn its calls, their seconds and tokens, and the tool's."""

    setup: float
    turns: list


@dataclass(order=True)
class Event:
    at: float
    number: int
    do: object = field(compare=False)


class Replica:
    """An engine whose calls take their time and hold their tokens, and rollouts of groups that are taken in turn."""

    def __init__(self, groups, places, limit, kv_tokens, bound, *, reports):
        self.n = len(groups[0])
        self.admission = Admission(places, limit, self.n, bound)
        self.places, self.limit, self.kv_tokens, self.reports = places, limit, kv_tokens, reports
        self.now, self.events, self.count = 0.0, [], 0
        self.groups, self.coming, self.taken = deque(enumerate(groups)), deque(), deque()
        self.held, self.calls, self.began, self.ended, self.most = {}, 0, [], 0, 0

    def later(self, seconds, do):
        self.count += 1
        heapq.heappush(self.events, Event(self.now + seconds, self.count, do))

    def let_in(self):
        for _ in range(self.admission.groups(self.now)):
            if self.groups:
                assert not self.coming, "those of groups that were taken go first"
                number, plans = self.groups.popleft()
                self.admission.begin_group(str(number))
                self.taken.extend((f"{number}/{index}", plan) for index, plan in enumerate(plans))
        self.coming.extend(self.taken)
        self.taken.clear()
        while self.coming and self.admission.room(self.now):
            assert self.calls < self.places, "calls that have turns before them go first"
            assert len(self.held) < self.limit
            name, plan = self.coming.popleft()
            self.admission.begin(name, name.partition("/")[0], self.now)
            self.began.append(name)
            self.held[name] = 0
            self.later(plan.setup, partial(self.turn, name, plan, 0))

    def turn(self, name, plan, index):
        if index == len(plan.turns):
            self.admission.end(name)
            del self.held[name]
            self.ended += 1
            group = name.partition("/")[0]
            if not any(other.startswith(f"{group}/") for other in (*self.held, *(name for name, _ in self.coming))):
                self.admission.end_group(group)
            return
        calls, seconds, tokens, tool = plan.turns[index]
        left = [calls]

        def done(trajectory):
            self.calls -= 1
            self.held[name] += tokens
            self.admission.holds(name, trajectory, self.held[name])
            self.admission.answered(name, trajectory)
            left[0] -= 1
            if not left[0]:
                self.later(tool, partial(self.turn, name, plan, index + 1))

        for each in range(calls):
            self.calls += 1
            self.most = max(self.most, self.calls)
            self.admission.call(name, f"{name}.{each}")
            self.later(seconds, partial(done, f"{name}.{each}"))

    def tick(self):
        if self.reports:
            use = min(1.0, sum(self.held.values()) / self.kv_tokens)
            self.admission.report(EngineLoad(max(0, self.calls - self.places), use, self.kv_tokens))
        if self.groups or self.coming or self.held:
            self.later(1.0, self.tick)

    def run(self):
        self.tick()
        self.let_in()
        while self.events:
            event = heapq.heappop(self.events)
            self.now = event.at
            event.do()
            self.let_in()
        return self.now


SECONDS = st.floats(0, 8)
TURN = st.tuples(st.integers(1, 3), SECONDS, st.integers(0, 400), SECONDS)
PLAN = st.builds(Plan, SECONDS, st.lists(TURN, max_size=4))
GROUPS = st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(PLAN, min_size=n, max_size=n), min_size=1, max_size=6))


def total(plan):
    return plan.setup + sum(seconds + tool for _, seconds, _, tool in plan.turns)


@given(GROUPS, st.integers(1, 5), st.integers(0, 8), st.integers(1, 3000), st.floats(0.05, 2), st.booleans())
def test_every_rollout_begins_in_turn_and_ends(groups, places, more, kv_tokens, bound, reports):
    """No deadlock and no starvation: at worst rollouts are made one after the other."""
    replica = Replica(groups, places, places + more, kv_tokens, bound, reports=reports)
    took = replica.run()
    assert replica.began == [f"{number}/{index}" for number, plans in enumerate(groups) for index in range(len(plans))]
    assert replica.ended == len(replica.began)
    alone = sum(total(plan) for plans in groups for plan in plans)
    assert took <= alone + 1.0 * (replica.ended + 1), "it was never idle while a rollout could begin"
    assert (replica.admission.open, replica.admission.kv_use) == (0, 0.0)
    assert replica.admission.groups(took) >= 1


@given(GROUPS, st.integers(1, 5))
def test_rollouts_that_wait_for_nothing_make_no_more_calls_than_there_are_places(groups, places):
    single = [[Plan(0.0, [(1, 1.0 + plan.setup, 10, 0.0)]) for plan in plans] for plans in groups]
    replica = Replica(single, places, 4 * places, 10**9, 0.9, reports=True)
    replica.run()
    assert replica.ended == sum(map(len, groups))
    assert replica.most <= places
