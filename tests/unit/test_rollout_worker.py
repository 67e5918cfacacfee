"""A replica with a scripted engine and queue: interruption, resumption, stamps, completeness of groups.

The same paths with the real engine and queue are in tests/integration/test_pipeline.py. What is handed over:
test_worker_snapshots.py; faults: test_worker_failures.py; environments: test_worker_environment.py.
"""

import asyncio

import numpy as np
import pytest

from async_rl.rollout.engine.interface import Score
from async_rl.weights.buckets import checksum
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import EOS, ListQueue, push, sampled, scripted, turns, worker


async def test_all_groups_are_published_complete():
    engine, queue = scripted(), ListQueue(5)
    subject, _ = worker(engine, queue)
    await subject.run()
    assert len(queue.groups) == 5
    assert all(len(group.trajectories) == 2 for group in queue.groups)
    assert {t.finish_reason for g in queue.groups for t in g.trajectories} == {"stop"}


@pytest.mark.parametrize("cuts", [1, 2, 4])
async def test_invariant_2_and_7_interrupted_generations_resume_with_true_stamps(cuts):
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    for _ in range(cuts):
        await sampled(engine, 4 * 5)
        await push(subject, engine)
    await run
    assert len(queue.groups) == 2
    for trajectory in (t for group in queue.groups for t in group.trajectories):
        assert trajectory.response_ids.tolist() == [*range(1, 30), EOS]
        assert len(trajectory.segments) == cuts + 1
        # The scripted log-prob names the version that sampled the token.
        assert trajectory.versions.tolist() == (-0.5 - trajectory.logprobs).astype(int).tolist()
        # Replaced, not concatenated: every row is of the last call.
        assert (trajectory.routed_experts[:, 0, 0] == cuts % 4).all()
    # A resumed call sends prompt and tokens so far, and may sample only what is left of the budget.
    for _, sent, budget in engine.requests:
        assert sent - 3 + budget == 40


async def test_drain_finishes_what_runs_before_the_push():
    engine, queue = scripted(length=20), ListQueue(2)
    subject, _ = worker(engine, queue, mode="drain")
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await push(subject, engine)
    await run
    assert all(not t.is_partial for group in queue.groups for t in group.trajectories)
    assert all(t.oldest_version == 0 for group in queue.groups for t in group.trajectories)


async def test_nothing_is_begun_while_paused():
    engine, queue = scripted(), ListQueue(2)
    subject, _ = worker(engine, queue)
    await subject.pause()
    run = asyncio.create_task(subject.run())
    await turns(20)
    assert engine.requests == []
    await subject.wake()
    await turns(20)
    assert engine.requests == []  # the canary may compute, rollouts may not
    await subject.resume()
    await run
    assert len(queue.groups) == 2


class Receiver(ScriptedEngine):
    """Takes weights in the order of the calls; hangs in ``stuck``."""

    stuck = None

    def __getattribute__(self, name):
        if name not in ("start_weight_update", "update_weights", "finish_weight_update"):
            return super().__getattribute__(name)

        async def call(*arguments):
            self.received.append((name, *arguments))
            if name == self.stuck:
                await asyncio.Event().wait()

        return call


async def test_staged_weights_are_taken_in_one_call_and_a_call_that_hangs_in_it_is_named():
    engine = scripted(kind=Receiver)
    engine.received = []
    subject, _ = worker(engine, ListQueue(0))
    await subject.pause()
    await subject.receive({"round": 3}, 7)
    calls = [name for name, *_ in engine.received]
    assert calls == ["start_weight_update", "update_weights", "finish_weight_update"]
    assert engine.received[1][1].update_info == {"round": 3}
    assert (engine.version, await subject.unanswered()) == (7, None)
    engine.stuck = "update_weights"
    receiving = asyncio.ensure_future(subject.receive({"round": 4}, 8))
    await turns(5)
    assert (engine.version, await subject.unanswered()) == (7, "update_weights")
    receiving.cancel()


async def test_stop_gives_up_what_runs():
    engine, queue = scripted(length=1000, max_response_tokens=2000), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_num_seqs": 4, "max_response_tokens": 2000})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.stop()
    await asyncio.wait_for(run, 5)
    assert queue.groups == []


async def test_counts_tokens_and_busy_time():
    engine, queue = scripted(length=12), ListQueue(3)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await push(subject, engine)
    await run
    stats = subject.stats()
    assert stats.generated_tokens == 3 * 2 * 12
    assert stats.trajectories == 6
    assert stats.partial_rollouts > 0
    assert stats.resumed_prefill_tokens > 0
    assert stats.running_trajectories == 0
    assert 0 < stats.busy_s < 60


class Scorer(ScriptedEngine):
    """Scores with any weights, and not while it is paused."""

    async def score(self, sequences):
        assert self._running.is_set()
        self.scored = ["score"]
        return [Score(np.zeros(len(s) - 1, np.float32), np.zeros((len(s) - 1, 2, 2), np.uint8)) for s in sequences]


class ScorerOnResume(Scorer):
    async def resume_and_score(self, sequences):
        await self.resume()
        scores = await self.score(sequences)
        self.scored = ["resume_and_score"]
        return scores


@pytest.mark.parametrize(("kind", "call"), [(Scorer, "score"), (ScorerOnResume, "resume_and_score")])
async def test_a_paused_replica_is_scored_at_once_where_its_engine_can(kind, call, monkeypatch):
    monkeypatch.setattr("async_rl.rollout.actor.check_probe", lambda rows, lengths, spec: checked.append(lengths))
    checked = []
    engine = scripted(kind=kind)
    subject, _ = worker(engine, ListQueue(0))
    await subject.pause()
    (score,) = await subject.wake_and_score([np.arange(5, dtype=np.int32)])
    assert len(score.logprobs) == 4
    assert (engine.scored, checked) == ([call], [[5]])
    assert not subject._gate.is_open, "rollouts wait for the canary"


@pytest.mark.parametrize("kind", [Scorer, ScorerOnResume])
async def test_routed_experts_of_a_probe_are_sent_with_its_scores_or_kept_where_they_are_large(kind, monkeypatch):
    monkeypatch.setattr("async_rl.rollout.actor.check_probe", lambda *_: None)
    subject, _ = worker(scripted(kind=kind), ListQueue(0))
    small, large = ([np.arange(n, dtype=np.int32)] * 2 for n in (100, 10_000))
    for sequences, kept in ((small, False), (large, True), (small, False)):
        await subject.pause()
        scores = await subject.wake_and_score(sequences)
        rows = await subject.probed_routing()
        assert [len(score.logprobs) for score in scores] == [len(s) - 1 for s in sequences]
        if kept:
            assert [score.routed_experts for score in scores] == [None, None]
            assert [score.left_behind for score in scores] == [checksum(each) for each in rows]
            assert [len(each) for each in rows] == [9_999, 9_999]
        else:
            assert [(len(score.routed_experts), score.left_behind) for score in scores] == [(99, None)] * 2
            assert rows == []


async def test_tokens_of_calls_under_way_are_progress():
    engine, queue = scripted(length=40), ListQueue(1)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    seen = []
    for _ in range(3):
        await sampled(engine, 2)
        seen.append((subject.stats().sampled_tokens, subject.stats().generated_tokens))
    assert seen == sorted(set(seen)), "they grow"
    assert {generated for _, generated in seen} == {0}, "although no call has ended"
    await run
