"""The edges of the broker one by one; under arbitrary calls: test_broker_machine.py."""

import msgpack
import pytest

from async_rl.errors import ConfigError, DuplicateGroup, QueueError, UnknownGroup
from async_rl.queue.records import GroupMeta
from tests.support.queue_parts import Source, ids, make_broker, meta


def finish(broker, n=1, worker="w", **of_meta):
    """Issue and put n groups; their ids."""
    tickets = broker.issue(worker, n)
    assert len(tickets) == n
    for ticket in tickets:
        broker.put(meta(ticket, **of_meta))
    return [ticket.group_id for ticket in tickets]


def test_threshold_0_issues_nothing_between_the_last_training_and_the_push():
    broker = make_broker(window_limit=2)
    first = finish(broker, 2)
    assert broker.issue("w", 9) == []
    broker.lease(2, "t")
    assert broker.issue("w", 9) == []
    broker.ack(first)
    assert broker.issue("w", 9) == []  # trained, but in this window
    assert broker.refusal() == "budget full: 2 of 2 groups of window 0; 2 trained in it"
    broker.advance(1)
    assert [ticket.version for ticket in broker.issue("w", 9)] == [1, 1]


def test_returned_and_failed_groups_leave_room_in_the_window():
    broker = make_broker(window_limit=2)
    a, b = broker.issue("w", 2)
    broker.return_group(a.group_id, "interrupted")
    broker.fail(b.group_id, "reward")
    assert [ticket.group_id for ticket in broker.issue("w", 9)] == ["0-1.1", "0-3.0"]


def test_invariant_4_at_max_staleness_0_everything_goes_stale_at_once():
    broker = make_broker(max_staleness=0, on_stale="drop")
    finish(broker, 3)
    broker.advance(1)
    assert broker.lease(2, "t") is None
    stats = broker.stats()
    assert stats.dropped == {"stale": 3}
    assert (stats.queued_groups, stats.held_bytes) == (0, 0)
    assert [ticket.group_id for ticket in broker.issue("w", 9)] == ["0-1.1", "0-2.1", "0-3.1", "0-4.0"]


def test_a_prompt_is_given_up_by_its_time_outs_and_not_by_other_losses():
    broker = make_broker(Source(rows=1), max_attempts=2, on_stale="drop")
    for version in (1, 2):
        broker.issue("w", 1)
        broker.worker_lost("w")
        (stale,) = finish(broker, oldest=0)
        broker.return_group(stale, "payload_lost")
        broker.advance(version)
    (first,) = broker.issue("w", 1)
    broker.return_group(first.group_id, "timeout")
    (second,) = broker.issue("w", 1)
    assert second.group_id == "0-1.5"
    broker.restore(msgpack.unpackb(msgpack.packb(broker.state())))  # its time-outs are part of the state
    broker.return_group(second.group_id, "timeout")
    assert broker.stats().failed == {"timeout": 1}
    assert broker.issue("w", 1) == []


def go_stale(broker, ticket):
    """Put a group that outlived the bound."""
    broker.advance(broker.version + 2)
    assert not broker.put(meta(ticket, oldest=broker.version - 2, newest=broker.version))


def test_a_prompt_whose_groups_go_stale_again_and_again_comes_last_and_not_forever():
    source = Source(rows=4)
    broker = make_broker(source, on_stale="drop", max_stale_drops=4)
    (ticket,) = broker.issue("w", 1)
    go_stale(broker, ticket)
    (ticket,) = broker.issue("w", 1)
    assert ticket.group_id == "0-1.1"  # once may be chance: it comes first
    go_stale(broker, ticket)
    others = broker.issue("w", 3)
    assert [other.prompt.prompt_id for other in others] == ["0-2", "0-3", "0-4"]
    (ticket,) = broker.issue("w", 1)
    assert ticket.group_id == "0-1.2"
    go_stale(broker, ticket)
    broker.restore(msgpack.unpackb(msgpack.packb(broker.state())))  # its drops are part of the state
    (ticket,) = broker.issue("w", 1)
    assert ticket.group_id == "0-1.3"
    go_stale(broker, ticket)
    stats = broker.stats()
    assert (stats.dropped, stats.failed) == ({"stale": 3}, {"stale": 1})
    assert stats.counts.add_up
    assert broker.issue("w", 1) == []


def test_training_clears_what_a_prompts_groups_met_before():
    broker = make_broker(Source(rows=1), max_attempts=2, can_rewind=True)
    (ticket,) = broker.issue("w", 1)
    broker.return_group(ticket.group_id, "timeout")
    (trained,) = finish(broker)
    broker.lease(1, "t")
    broker.ack([trained], 1)
    broker.rewind(0)
    broker.advance(1)
    (again,) = broker.issue("w", 1)
    assert again.group_id == "0-1.2"
    broker.return_group(again.group_id, "timeout")
    assert broker.stats().failed == {}


def test_mask_keeps_a_group_with_one_fresh_token_and_drops_one_without():
    broker = make_broker(on_stale="mask", max_staleness=0, version=5)
    kept, gone = broker.issue("w", 2)
    broker.put(meta(kept, oldest=2, newest=5))
    broker.put(meta(gone, oldest=2, newest=4))
    assert ids(broker.lease(1, "t")) == [kept.group_id]
    assert broker.stats().dropped == {"stale": 1}


def test_a_group_released_after_a_push_is_judged_by_the_new_version():
    broker = make_broker(on_stale="drop", max_staleness=0)
    finish(broker, 2)
    leased = ids(broker.lease(2, "t"))
    broker.advance(1)
    assert broker.counts().dropped == 0  # a lease is the consumer's
    broker.release(leased)
    assert broker.counts().dropped == 2


def test_release_restores_the_order_and_a_duplicate_put_is_refused():
    broker = make_broker()
    order = finish(broker, 4)
    broker.lease(3, "t")
    broker.release([order[2], order[0]])
    with pytest.raises(DuplicateGroup, match=order[0]):
        broker.put(GroupMeta(order[0], 1, 1, 0, 0, 1, 0))
    assert ids(broker.lease(3, "t")) == [order[0], order[2], order[3]]


def test_a_late_put_is_told_what_became_of_the_group():
    broker = make_broker()
    (trained,) = finish(broker)
    broker.lease(1, "t")
    broker.ack([trained])
    with pytest.raises(DuplicateGroup, match="was trained"):
        broker.put(GroupMeta(trained, 1, 1, 0, 0, 1, 0))
    (lost,) = broker.issue("w", 1)
    broker.worker_lost("w")
    with pytest.raises(UnknownGroup, match=r"was returned \(worker_lost\)"):
        broker.put(meta(lost))
    (again,) = broker.issue("v", 1)
    assert (again.group_id, again.prompt) == ("0-2.1", lost.prompt)


def test_a_lost_worker_loses_what_it_ran_and_nothing_that_it_finished():
    broker = make_broker(window_limit=6)
    leased = finish(broker, 1, worker="a")
    broker.lease(1, "t")
    queued = finish(broker, 1, worker="a")
    (running,) = broker.issue("a", 1)
    finish(broker, 1, worker="b")
    assert broker.worker_lost("a") == [running.group_id]
    assert broker.counts().dropped == 0
    broker.ack(leased)
    assert broker.stats().queued_groups == 2
    assert ids(broker.lease(1, "t")) == queued


def test_groups_that_are_kept_stay_running_and_pass_to_the_next_worker():
    broker = make_broker(window_limit=4)
    kept, lost = broker.issue("a", 2)
    assert broker.worker_lost("a", keep=[kept.group_id, "0-9.9"]) == [lost.group_id]
    assert broker.ticket(kept.group_id) == kept
    assert broker.adopt("b", [kept.group_id, lost.group_id]) == [kept.group_id]
    assert broker.worker_lost("a") == []
    assert broker.put(meta(kept)) is True


def test_what_is_trained_again_is_a_group_of_its_own():
    broker = make_broker(window_limit=4, can_rewind=True)
    for step in (1, 2):
        done = finish(broker, 2)
        broker.lease(2, "t")
        broker.ack(done, step)
    assert broker.rewind(1) == ["0-3", "0-4"]
    assert broker.counts().trained == 2
    broker.advance(1)
    assert [ticket.group_id for ticket in broker.issue("w", 3)] == ["0-3.1", "0-4.1", "0-5.0"]
    assert broker.rewind(1) == []


def test_ack_is_all_or_nothing():
    broker = make_broker()
    order = finish(broker, 2)
    broker.lease(1, "t")
    for wrong in ([order[0], order[1]], [order[0], order[0]]):
        with pytest.raises(UnknownGroup):
            broker.ack(wrong)
    assert broker.counts().trained == 0
    broker.ack([order[0]])


def test_the_groups_of_a_training_step_are_admitted_whatever_their_size():
    broker = make_broker(max_bytes=25, required_groups=2)
    tickets = broker.issue("w", 4)
    broker.put(meta(tickets[0], nbytes=26))  # larger than the bound alone
    assert not broker.full_for(10**9)
    broker.put(meta(tickets[1], nbytes=10**9))
    assert broker.full_for(1)  # no more than the step needs
    leased = ids(broker.lease(2, "t"))
    assert broker.full_for(1)  # in training, payloads are kept
    broker.ack(leased)
    broker.put(meta(tickets[2], nbytes=30))


def test_a_step_that_leases_groups_as_they_come_gets_the_rest_of_them():
    broker = make_broker(Source(9), required_groups=3, window_limit=6, max_groups=6, max_bytes=100)
    finish(broker, 2, nbytes=60)
    leased = ids(broker.lease(3, "t", at_least=1))
    assert len(leased) == 2
    leased += finish(broker, 1, nbytes=60)
    assert broker.full_for(60)
    assert len(broker.lease(1, "t")) == 1
    broker.ack(leased)


def test_a_group_without_bytes_is_refused():
    broker = make_broker()
    (ticket,) = broker.issue("w", 1)
    with pytest.raises(QueueError, match="its message has 0 bytes"):
        broker.put(meta(ticket, nbytes=0))
    assert broker.counts().outstanding == 1


def test_rewinding_without_a_memory_of_what_was_trained_is_refused():
    with pytest.raises(QueueError, match=r"set checkpoint\.every"):
        make_broker().rewind(0)


def test_max_groups_below_a_training_step_is_refused():
    with pytest.raises(ConfigError, match=r"queue\.max_groups is 1, less than the 2"):
        make_broker(max_groups=1)


def test_refusal_names_who_holds_the_window():
    broker = make_broker(version=7)
    assert broker.refusal() is None
    broker.issue("2", 3)
    finish(broker, 1, worker="1")
    assert broker.refusal() == "budget full: 4 of 4 groups of window 7; 3 in flight on worker 2, 1 queued"


def test_the_end_of_the_dataset():
    broker = make_broker(Source(rows=2))
    a, b = broker.issue("w", 2)
    assert not broker.stats().exhausted  # nobody has asked for more yet
    broker.put(meta(a))
    assert broker.issue("w", 1) == []
    assert broker.refusal() == "the dataset is exhausted"
    assert not broker.starved(2)
    broker.fail(b.group_id, "reward")
    assert broker.starved(2)
    assert not broker.finished
    broker.return_group(a.group_id, "stale")
    assert not broker.starved(2)  # its prompt is in circulation again
    (again,) = broker.issue("w", 1)
    broker.put(meta(again))
    broker.lease(1, "t")
    broker.ack([again.group_id])
    assert broker.issue("w", 1) == []
    assert broker.finished


def test_a_dataset_that_raises_midway_loses_no_prompt():
    class Breaking(Source):
        def next(self):
            if self.row == 2 and not self.circulating:
                raise OSError("disk")
            return super().next()

    source = Breaking()
    broker = make_broker(source)
    with pytest.raises(OSError, match="disk"):
        broker.issue("w", 4)
    assert broker.counts().issued == 0
    assert [ticket.prompt.row for ticket in broker.issue("w", 2)] == [1, 2]


def test_a_dataset_that_repeats_an_outstanding_prompt_is_refused():
    class Repeating(Source):
        def next(self):
            self.row = 0
            return super().next()

    broker = make_broker(Repeating())
    with pytest.raises(QueueError, match="prompt 0-1"):
        broker.issue("w", 2)
    assert broker.counts().issued == 0


def test_what_is_leased_does_not_count_as_what_may_still_come():
    broker = make_broker(Source(2), required_groups=2, window_limit=4, max_groups=4, max_bytes=100)
    finish(broker, 2, nbytes=10)
    broker.issue("w", 1)  # the dataset says that it has no more
    broker.lease(1, "t")
    assert not broker.starved(1)
    assert broker.starved(2)
    broker.lease(1, "t")
    assert not broker.starved(1)  # the step is complete, and may yet be given back


def test_a_step_that_lost_a_leased_group_waits_for_another_one():
    broker = make_broker(Source(2), required_groups=2, window_limit=4)
    finish(broker, 2)
    first, _ = broker.lease(2, "t")
    broker.return_group(first.group_id, "payload_lost")
    assert not broker.starved(1)  # its prompt is in circulation again
    (again,) = broker.issue("w", 2)
    assert (again.group_id, broker.stats().dropped) == ("0-1.1", {"payload_lost": 1})
    broker.fail(again.group_id, "reward")
    assert broker.starved(1), "the group that is left belongs to the step that waits"
