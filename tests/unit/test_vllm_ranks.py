"""Which data-parallel rank of an engine gets which call."""

import contextlib

from async_rl.rollout.engine.vllm import ranks
from async_rl.rollout.engine.vllm.ranks import Ranks


def rank_of(ranks, request_id):
    with ranks.one_for(request_id) as rank:
        return rank


def test_a_rollout_begins_with_the_rank_that_has_the_fewest_calls():
    subject = Ranks(3, spread=10)
    with contextlib.ExitStack() as running:
        found = [running.enter_context(subject.one_for(f"0-{i}.0/0/0")) for i in range(7)]
        assert sorted(map(found.count, range(3))) == [2, 2, 3]
    assert rank_of(subject, "0-9.0/0/0") == 0, "all have ended"


def test_a_rollout_stays_with_its_rank_whose_cache_has_what_came_before():
    subject = Ranks(2, spread=10)
    with subject.one_for("0-0.0/0/0"):
        assert rank_of(subject, "0-1.0/0/0") == 1
    for call in ("0-1.0/0/1", "0-1.0/0/1/3/0"):
        assert rank_of(subject, call) == 1
        assert rank_of(subject, "0-1.0/1/0") == 0, "another rollout of the group"


def test_a_rollout_leaves_a_rank_that_has_many_calls_more():
    subject = Ranks(2, spread=2)
    with subject.one_for("0-0.0/0/0"):
        with contextlib.ExitStack() as running:
            for i in (1, 2, 3):
                running.enter_context(subject.one_for(f"0-{i}.0/0/0"))
            # Rank 0 has the calls of 0-0.0 and 0-2.0, rank 1 those of 0-1.0 and 0-3.0.
            assert rank_of(subject, "0-2.0/0/1") == 0
        with subject.one_for("0-2.0/0/2"):
            assert rank_of(subject, "0-2.0/0/3") == 1
    assert rank_of(subject, "0-2.0/0/4") == 1, "and stays there"


def test_a_call_that_fails_has_no_rank_any_more():
    subject = Ranks(2, spread=10)
    with contextlib.suppress(ValueError), subject.one_for("0-0.0/0/0"):
        raise ValueError
    assert rank_of(subject, "0-1.0/0/0") == 0


def test_rollouts_long_without_a_call_are_forgotten(monkeypatch):
    monkeypatch.setattr(ranks, "_REMEMBERED", 2)
    subject = Ranks(2, spread=10)
    with subject.one_for("0-0.0/0/0"):
        assert [rank_of(subject, f"0-{i}.0/0/0") for i in (1, 2, 1, 3)] == [1, 1, 1, 1]
        assert list(subject._of) == ["0-1.0/0", "0-3.0/0"]
