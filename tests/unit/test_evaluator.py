"""Evaluation within training: beside rollouts, on the replicas that there are; what waits for it, and what ends it."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from async_rl.config.inputs import EvalSection, Terms
from async_rl.driver.evaluation import EvalSet, Evaluator
from async_rl.errors import ReplicaFailed, RewardError
from async_rl.metrics.evaluation import Answered, EvalRules
from async_rl.rollout.evaluation import EvalAnswer, EvalProblem, EvalResult

PROMPTS = ["a", "b", "c", "d", "e"]


def eval_set(name="held_out", names=PROMPTS, every=2, k=1):
    problems = tuple(EvalProblem(Terms(name, 40), SimpleNamespace(prompt_id=each), k) for each in names)
    return EvalSet(name, problems, EvalRules(k, (k,), 1.0), every)


class Parts:
    """Sync, replicas, monitor and recorder in one. A replica answers when it may; those in ``fails`` die instead.

    The reward is 1 on problem a, 0 on others; those in ``unscored`` have none.
    """

    def __init__(self, replicas=2, fails=(), error=None, unscored=()):
        self.members = dict.fromkeys(range(replicas))
        self.fails, self.error = set(fails), error
        self.may_answer, self.asked, self.phases = asyncio.Event(), [], []
        self.lines, self.samples, self.unscored = [], [], unscored

    async def on(self, replica, call):
        problems = await call(SimpleNamespace(evaluate=self.problems))
        self.asked.append((replica, [problem.prompt.prompt_id for problem in problems]))
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        if replica in self.fails:
            raise ReplicaFailed(replica, "it died")
        return EvalResult(7, tuple(self.answer(problem) for problem in problems))

    def answer(self, problem):
        name = problem.prompt.prompt_id
        scored = Answered((float(name == "a"),) * problem.k, (3,) * problem.k, 0)
        return EvalAnswer(problem.set, name, None if name in self.unscored else scored)

    async def problems(self, problems):
        return problems

    def evict(self, failed):
        del self.members[failed.replica]

    def evaluation(self, results, version, step):
        self.lines.append({**results, "policy_version": version, "step": step})

    def is_evaluated(self, name, version, step):
        return (name, version, step) in [(line["set"], line["policy_version"], line["step"]) for line in self.lines]

    def eval_sample(self, prompt, answer, version, step):
        self.samples.append((prompt.prompt_id, answer.prompt_id))

    @property
    def evaluated(self):
        return [(line["set"], line["policy_version"]) for line in self.lines]

    @contextlib.contextmanager
    def phase(self, name, step):
        self.phases.append(name)
        yield


def evaluator(parts, sets=None, **settings):
    config = SimpleNamespace(eval=EvalSection(every=2, **settings))
    return Evaluator(config, sets or [eval_set()], sync=parts, replicas=parts, monitor=parts, recorder=parts)


async def test_an_evaluation_begins_beside_rollouts_and_what_changes_the_weights_waits_for_it():
    parts = Parts()
    subject = evaluator(parts)
    await subject.while_paused(4, 1)
    assert parts.asked == [], "not while the engines are paused"
    subject.beside_rollouts(3, 1)
    await subject.finished(1)  # version 3 is not due
    subject.beside_rollouts(4, 1)
    sync = asyncio.ensure_future(subject.finished(1))
    await asyncio.sleep(0.01)
    assert not sync.done()
    assert parts.asked == [(0, ["a", "c", "e"]), (1, ["b", "d"])]
    parts.may_answer.set()
    await sync
    (line,) = parts.lines
    assert (line["problems"], line["avg"]["mean"], line["policy_version"], line["step"]) == (5, 0.2, 4, 1)
    assert sorted(parts.samples) == [(name, name) for name in PROMPTS]
    assert parts.phases == ["evaluation"]


async def test_rollouts_may_be_paused_for_an_evaluation_instead():
    parts = Parts()
    subject = evaluator(parts, beside_rollouts=False)
    parts.may_answer.set()
    await subject.while_paused(4, 1)
    assert parts.evaluated == [("held_out", 4)]
    parts.asked.clear()
    subject.beside_rollouts(4, 1)
    await subject.finished(1)
    assert parts.asked == []


async def test_only_the_share_of_a_replica_that_fails_is_answered_again():
    parts = Parts(replicas=3, fails={1})
    parts.may_answer.set()
    await evaluator(parts).evaluate(4, 1)
    assert parts.asked[:3] == [(0, ["a", "d"]), (1, ["b", "e"]), (2, ["c"])]
    assert parts.asked[3:] == [(0, ["b"]), (2, ["e"])]
    assert parts.lines[0]["problems"] == 5


async def test_without_a_replica_there_is_no_result():
    parts = Parts(replicas=1, fails={0})
    parts.may_answer.set()
    await evaluator(parts).evaluate(4, 1)
    assert parts.evaluated == []


async def test_what_an_evaluation_raises_is_raised_where_it_is_waited_for():
    parts = Parts(error=RewardError("each of 5 evaluation problems failed"))
    subject = evaluator(parts)
    parts.may_answer.set()
    subject.beside_rollouts(4, 1)
    with pytest.raises(RewardError, match="each of 5"):
        await subject.finished(1)
    await subject.finished(1)  # once


async def test_an_evaluation_that_is_cancelled_makes_nothing_wait_or_fail():
    parts = Parts()
    subject = evaluator(parts)
    subject.beside_rollouts(4, 1)
    waiting = asyncio.ensure_future(subject.finished(1))
    await asyncio.sleep(0.01)
    subject.cancel()
    await asyncio.wait_for(waiting, 5)
    assert parts.evaluated == []


async def test_each_set_has_its_own_pace_and_its_own_result():
    parts, often = Parts(), eval_set("often", ["a", "b"], every=1, k=2)
    parts.may_answer.set()
    subject = evaluator(parts, [eval_set(), often, eval_set("ends", ["a"], every=0)])
    await subject.evaluate(0, 0)
    for version in (1, 2, 3):
        subject.beside_rollouts(version, version)
        await subject.finished(version)
    await subject.evaluate(3, 3)
    assert parts.evaluated == [
        ("held_out", 0), ("often", 0), ("ends", 0), ("often", 1), ("held_out", 2), ("often", 2), ("often", 3),
        ("held_out", 3), ("ends", 3),
    ]  # fmt: skip
    assert [(line["k"], line["problems"], line["avg"]["mean"]) for line in parts.lines[:3]] == [
        (1, 5, 0.2), (2, 2, 0.5), (1, 1, 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize("beside", [True, False])
async def test_a_restored_run_evaluates_what_its_end_has_cut_off(beside):
    parts, sets = Parts(), [eval_set(), eval_set("other")]
    parts.may_answer.set()
    parts.lines.append({"set": "other", "policy_version": 4, "step": 9})
    subject = evaluator(parts, sets, beside_rollouts=beside)
    await subject.restored(4, 9)
    await subject.finished(9)
    assert parts.evaluated == [("other", 4), ("held_out", 4)]
    await subject.restored(5, 9)
    await subject.finished(9)
    assert len(parts.lines) == 2, "version 5 is not due"


async def test_what_a_restart_of_the_trainer_has_ended_is_evaluated_at_the_next_version_of_the_same_weights():
    parts = Parts()
    subject = evaluator(parts)
    for step, then, expected in ((4, 3, []), (4, 4, [("held_out", 5)])):
        subject.beside_rollouts(4, step)
        subject.cancel()
        await subject.finished(step)
        parts.may_answer.set()
        subject.beside_rollouts(5, then)
        await subject.finished(then)
        assert parts.evaluated == expected
        parts.may_answer.clear()


async def test_a_set_on_which_every_problem_failed_ends_the_run_and_one_problem_is_counted():
    parts = Parts(unscored=("x", "e"))
    parts.may_answer.set()
    await evaluator(parts).evaluate(4, 1)
    assert (parts.lines[0]["problems"], parts.lines[0]["failed"]) == (4, 1)
    with pytest.raises(RewardError, match=r"eval.sets.mine: each of 1 evaluation problems failed"):
        await evaluator(parts, [eval_set("mine", ["x"]), eval_set("other")]).evaluate(6, 2)
