"""Evaluation within training: beside rollouts, on the replicas that there are; what waits for it, and what ends it."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from async_rl.config.schema import EvalSection
from async_rl.driver.evaluation import Evaluator
from async_rl.errors import ReplicaFailed, RewardError
from async_rl.rollout.evaluation import EvalResult

PROMPTS = ["a", "b", "c", "d", "e"]


class Parts:
    """Sync, replicas, monitor and recorder in one. A replica answers when it may; those in ``fails`` die instead."""

    def __init__(self, replicas=2, fails=(), error=None):
        self.members = dict.fromkeys(range(replicas))
        self.fails, self.error = set(fails), error
        self.may_answer, self.asked, self.results, self.phases = asyncio.Event(), [], [], []
        self.evaluated = None

    async def on(self, replica, call):
        prompts = await call(SimpleNamespace(evaluate=self.prompts))
        self.asked.append((replica, prompts))
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        if replica in self.fails:
            raise ReplicaFailed(replica, "it died")
        return EvalResult(7, 0.5, len(prompts), 3.0)

    async def prompts(self, prompts):
        return prompts

    def evict(self, failed):
        del self.members[failed.replica]

    def evaluation(self, results, version):
        self.results, self.evaluated = results, version

    @contextlib.contextmanager
    def phase(self, name, step):
        self.phases.append(name)
        yield


def evaluator(parts, **settings):
    config = SimpleNamespace(eval=EvalSection(every=2, **settings))
    return Evaluator(config, PROMPTS, sync=parts, replicas=parts, monitor=parts, recorder=parts)


async def test_an_evaluation_begins_beside_rollouts_and_what_changes_the_weights_waits_for_it():
    parts = Parts()
    subject = evaluator(parts)
    await subject.while_paused(4, 1)
    assert parts.asked == [], "not while the engines are paused"
    subject.beside_rollouts(3)
    await subject.finished(1)  # version 3 is not due
    subject.beside_rollouts(4)
    sync = asyncio.ensure_future(subject.finished(1))
    await asyncio.sleep(0.01)
    assert not sync.done()
    assert parts.asked == [(0, ["a", "c", "e"]), (1, ["b", "d"])]
    parts.may_answer.set()
    await sync
    assert sum(result.n for result in parts.results) == 5
    assert parts.evaluated == 4
    assert parts.phases == ["evaluation"]


async def test_rollouts_may_be_paused_for_an_evaluation_instead():
    parts = Parts()
    subject = evaluator(parts, beside_rollouts=False)
    parts.may_answer.set()
    await subject.while_paused(4, 1)
    assert parts.evaluated == 4
    parts.asked.clear()
    subject.beside_rollouts(4)
    await subject.finished(1)
    assert parts.asked == []


async def test_only_the_share_of_a_replica_that_fails_is_answered_again():
    parts = Parts(replicas=3, fails={1})
    parts.may_answer.set()
    await evaluator(parts).evaluate(4, 1)
    assert parts.asked[:3] == [(0, ["a", "d"]), (1, ["b", "e"]), (2, ["c"])]
    assert parts.asked[3:] == [(0, ["b"]), (2, ["e"])]
    assert sum(result.n for result in parts.results) == 5


async def test_without_a_replica_there_is_no_result():
    parts = Parts(replicas=1, fails={0})
    parts.may_answer.set()
    await evaluator(parts).evaluate(4, 1)
    assert parts.evaluated is None


async def test_what_an_evaluation_raises_is_raised_where_it_is_waited_for():
    parts = Parts(error=RewardError("each of 5 evaluation problems failed"))
    subject = evaluator(parts)
    parts.may_answer.set()
    subject.beside_rollouts(4)
    with pytest.raises(RewardError, match="each of 5"):
        await subject.finished(1)
    await subject.finished(1)  # once


async def test_an_evaluation_that_is_cancelled_makes_nothing_wait_or_fail():
    parts = Parts()
    subject = evaluator(parts)
    subject.beside_rollouts(4)
    waiting = asyncio.ensure_future(subject.finished(1))
    await asyncio.sleep(0.01)
    subject.cancel()
    await asyncio.wait_for(waiting, 5)
    assert parts.evaluated is None
