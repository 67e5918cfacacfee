"""The broker as a state machine, under arbitrary calls; its edges one by one are in test_broker.py."""

from collections import Counter

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_rl.errors import DuplicateGroup, QueueError, UnknownGroup
from async_rl.queue.records import Ticket
from tests.support.examples import examples
from tests.support.queue_parts import Source, ids, make_broker, meta


class BrokerMachine(RuleBasedStateMachine):
    """Arbitrary calls, right and wrong, against a plain book of what should be where."""

    @initialize(
        rows=st.integers(1, 30),
        required=st.integers(1, 4),
        extra=st.integers(0, 4),
        room=st.integers(0, 4),
        max_bytes=st.integers(40, 120),
        max_staleness=st.integers(0, 2),
        on_stale=st.sampled_from(["mask", "drop"]),
    )
    def start(self, rows, required, extra, room, max_bytes, max_staleness, on_stale):
        self.source = Source(rows)
        self.limit, self.max_groups, self.max_bytes = required + extra, required + room, max_bytes
        self.max_staleness, self.on_stale = max_staleness, on_stale
        self.settings = {
            "required_groups": required,
            "window_limit": self.limit,
            "max_groups": self.max_groups,
            "max_bytes": max_bytes,
            "max_staleness": max_staleness,
            "on_stale": on_stale,
            "max_attempts": 2,
            "max_stale_drops": 3,
            "can_rewind": True,
        }
        self.broker = make_broker(self.source, **self.settings)
        self.required, self.waits_for_more = required, False
        self.version = 0
        self.window = 0
        self.running, self.queued, self.leased = {}, {}, {}  # group id: ticket or meta
        self.workers, self.prompts, self.trained, self.past = {}, {}, [], []
        self.step, self.checkpoint = 0, 0
        self.trained_at = {}  # prompt id: step, of what can be taken back
        self.timeouts, self.stale = Counter(), Counter()  # prompt id: groups since it was last trained
        self.issued = self.returned = self.failed = self.dropped = self.filtered = 0

    def book_fail(self, group_id):
        for state in (self.running, self.queued, self.leased):
            state.pop(group_id, None)
        self.failed += 1
        self.window -= 1
        self.past.append(group_id)

    def book_return(self, group_id):
        for state in (self.running, self.queued, self.leased):
            if state.pop(group_id, None) is not None:
                self.dropped += state is not self.running
        self.returned += 1
        self.window -= 1
        self.past.append(group_id)

    def book_stale(self):
        for group_id, m in list(self.queued.items()):
            version = m.oldest_version if self.on_stale == "drop" else m.newest_version
            if self.version - version > self.max_staleness:
                prompt = self.prompts[group_id]
                self.stale[prompt] += 1
                (self.book_fail if self.stale[prompt] == 3 else self.book_return)(group_id)

    @rule(worker=st.sampled_from("abc"), limit=st.integers(0, 6))
    def issue(self, worker, limit):
        available = self.source.rows - self.source.row + len(self.source.circulating) + len(self.source.deferred)
        tickets = self.broker.issue(worker, limit)
        assert len(tickets) == min(limit, max(0, self.limit - self.window), available)
        for ticket in tickets:
            assert ticket.version == self.version
            assert ticket.group_id not in self.prompts  # no group id is ever used twice
            assert ticket.prompt.prompt_id not in self.trained  # invariant 5: no prompt is trained twice
            self.prompts[ticket.group_id] = ticket.prompt.prompt_id
            self.running[ticket.group_id] = ticket
            self.workers[ticket.group_id] = worker
        self.issued += len(tickets)
        self.window += len(tickets)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), nbytes=st.integers(1, 150), age=st.integers(0, 4), span=st.integers(0, 4))
    def put(self, data, nbytes, age, span):
        ticket = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        oldest = max(0, self.version - age)
        group = meta(ticket, nbytes, oldest, min(self.version, oldest + span))
        held = [m.nbytes for m in [*self.queued.values(), *self.leased.values()]]
        fits = sum(held) + nbytes <= self.max_bytes and len(held) < self.max_groups
        full = not fits and len(held) >= self.required  # a training step's groups always fit
        assert self.broker.full_for(nbytes) is full
        if full:
            with pytest.raises(QueueError, match="full"):
                self.broker.put(group)
            return
        del self.running[ticket.group_id]
        self.queued[ticket.group_id] = group
        self.book_stale()
        assert self.broker.put(group) is (group.group_id in self.queued)

    @rule(n=st.integers(1, 4), data=st.data())
    def lease(self, n, data):
        if n > self.max_groups:
            with pytest.raises(QueueError, match=r"queue\.max_groups"):
                self.broker.lease(n, "trainer")
            return
        at_least = data.draw(st.sampled_from([None, *range(1, n + 1)]))
        leased = self.broker.lease(n, "trainer", at_least)
        if len(self.queued) < (at_least or n):
            assert leased is None
            return
        self.waits_for_more = len(self.leased) + len(leased) < self.required
        assert ids(leased) == list(self.queued)[:n]  # first finished, first leased
        for group in leased:
            version = group.oldest_version if self.on_stale == "drop" else group.newest_version
            assert self.version - version <= self.max_staleness  # invariant 4
            self.leased[group.group_id] = self.queued.pop(group.group_id)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def ack(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.leased)), unique=True))
        self.step += 1
        self.broker.ack(chosen, self.step)
        self.waits_for_more = False
        for group_id in chosen:
            del self.leased[group_id]
            self.trained.append(self.prompts[group_id])
            del self.timeouts[self.prompts[group_id]], self.stale[self.prompts[group_id]]
            self.trained_at[self.prompts[group_id]] = self.step
            self.past.append(group_id)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.leased)), unique=True))
        released = {i: self.leased.pop(i) for i in list(self.leased) if i in chosen}
        self.queued = released | self.queued
        self.book_stale()
        assert set(self.broker.release(chosen)) == released.keys() - self.queued.keys()
        self.waits_for_more = self.waits_for_more and bool(self.leased)

    @rule(data=st.data())
    def checkpoint_is_taken(self, data):
        self.checkpoint = data.draw(st.integers(self.checkpoint, self.step))
        self.broker.checkpointed(self.checkpoint)
        self.trained_at = {prompt: step for prompt, step in self.trained_at.items() if step > self.checkpoint}

    @rule(data=st.data())
    def trainer_goes_back(self, data):
        """Invariant 5 where gradients are lost: what was trained after the checkpoint is trained again, no more."""
        step = data.draw(st.integers(self.checkpoint, self.step))
        lost = {prompt for prompt, at in self.trained_at.items() if at > step}
        assert set(self.broker.rewind(step)) == lost
        for prompt in lost:
            del self.trained_at[prompt]
            self.trained.remove(prompt)
        self.returned += len(lost)
        self.step = step

    @rule()
    def restart(self):
        """The broker dies, and another one goes on from what was written down of it."""
        before = self.broker.stats()
        state = msgpack.unpackb(msgpack.packb(self.broker.state()))
        self.source = Source(0)
        self.broker = make_broker(self.source, **self.settings)
        self.broker.restore(state)
        assert self.broker.stats() == before
        self.past = []  # what became of ended groups is for messages, and forgotten

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def times_out(self, data):
        group_id = data.draw(st.sampled_from(sorted(self.running)))
        self.broker.return_group(group_id, "timeout")
        prompt = self.prompts[group_id]
        self.timeouts[prompt] += 1
        (self.book_fail if self.timeouts[prompt] == 2 else self.book_return)(group_id)

    @precondition(lambda self: self.running or self.past)
    @rule(worker=st.sampled_from("abc"), data=st.data())
    def adopt(self, worker, data):
        """Groups in flight pass to another worker; those that ended meanwhile do not."""
        named = data.draw(st.lists(st.sampled_from([*self.running, *self.past]), unique=True))
        adopted = self.broker.adopt(worker, named)
        assert adopted == [group_id for group_id in named if group_id in self.running]
        self.workers.update(dict.fromkeys(adopted, worker))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def filter_group(self, data):
        """Groups that teach nothing end, and free their place."""
        group_id = data.draw(st.sampled_from(sorted(self.running)))
        self.broker.filter_group(group_id, "zero_variance")
        del self.running[group_id]
        self.filtered += 1
        self.window -= 1
        self.past.append(group_id)

    @precondition(lambda self: self.running or self.queued or self.leased)
    @rule(data=st.data(), fail=st.booleans())
    def give_up(self, data, fail):
        group_id = data.draw(st.sampled_from(sorted(self.running | self.queued | self.leased)))
        if fail:
            self.broker.fail(group_id, "reward")
            self.book_fail(group_id)
        else:
            self.broker.return_group(group_id, "interrupted")
            self.book_return(group_id)

    @rule(worker=st.sampled_from("abc"), data=st.data())
    def worker_lost(self, worker, data):
        running = [i for i in self.running if self.workers[i] == worker]
        keep = data.draw(st.lists(st.sampled_from(running), unique=True)) if running else []
        expected = set(running) - set(keep)
        assert set(self.broker.worker_lost(worker, keep)) == expected
        for group_id in expected:
            self.book_return(group_id)

    @rule(step=st.integers(1, 3))
    def advance(self, step):
        self.version += step
        before = set(self.queued)
        self.window = len(self.running) + len(self.queued) + len(self.leased)
        self.book_stale()
        assert set(self.broker.advance(self.version)) == before - self.queued.keys()

    @rule(data=st.data())
    def wrong_calls_change_nothing(self, data):
        before = self.broker.stats()
        known = [*self.queued, *self.leased, *self.past, "0-1.99"]
        not_running = meta(Ticket(data.draw(st.sampled_from(known)), None, self.version))
        with pytest.raises((DuplicateGroup, UnknownGroup)):
            self.broker.put(not_running)
        not_leased = data.draw(st.sampled_from([*self.queued, *self.running, *self.past, "0-1.99"]))
        for call in (self.broker.ack, self.broker.release):
            with pytest.raises(UnknownGroup):
                call([*self.leased, not_leased])
        with pytest.raises(QueueError):
            self.broker.advance(self.version)
        for call in (self.broker.fail, self.broker.return_group):
            with pytest.raises(UnknownGroup):
                call(data.draw(st.sampled_from([*self.past, "0-1.99"])), "twice")
        with pytest.raises((DuplicateGroup, UnknownGroup)):
            self.broker.filter_group(not_running.group_id, "zero_variance")
        assert self.broker.stats() == before

    @invariant()
    def invariant_5_conservation(self):
        counts = self.broker.counts()
        assert counts.add_up
        assert counts.filtered == self.filtered
        assert counts.issued == counts.trained + counts.outstanding + counts.returned + counts.failed + self.filtered
        outstanding = len(self.running) + len(self.queued) + len(self.leased)
        assert counts.outstanding == outstanding
        assert (counts.issued, counts.trained) == (self.issued, len(self.trained))
        assert (counts.returned, counts.failed, counts.dropped) == (self.returned, self.failed, self.dropped)
        # No prompt is skipped: whatever the cursor passed is outstanding, trained, failed, filtered or in circulation.
        circulating = len(self.source.circulating) + len(self.source.deferred)
        assert self.source.row == outstanding + len(self.trained) + self.failed + self.filtered + circulating

    @invariant()
    def invariant_6_bounded(self):
        stats = self.broker.stats()
        held = [m.nbytes for m in [*self.queued.values(), *self.leased.values()]]
        assert stats.held_bytes == sum(held)
        assert sum(held) <= self.max_bytes or len(held) <= self.required
        assert stats.queued_groups + stats.leased_groups == len(held) <= self.max_groups
        assert stats.counts.outstanding <= stats.window_groups == self.window <= self.limit
        # Nothing is remembered of finished groups but a few outcomes, and attempts of circulating prompts.
        assert len(self.broker._outcomes) <= 2 * self.limit
        circulating = [*self.source.circulating, *self.source.deferred]
        assert set(self.broker._state.attempts) == {p.prompt_id for p in circulating}


BrokerMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
test_invariants_4_5_6_under_arbitrary_calls = BrokerMachine.TestCase
