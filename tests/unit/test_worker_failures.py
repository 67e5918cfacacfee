"""What a fault of a response, a reward, a request or the engine costs: that group, or the run."""

import asyncio

import numpy as np
import pytest

from async_rl.errors import EngineDied, EngineError, RewardError, RewardNotApplicable
from async_rl.rollout.engine.interface import EngineOutput
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import Digits, ListQueue, sampled, scripted, snapshot, worker


async def test_reward_failure_ends_the_run_or_the_group_as_configured():
    engine, queue = scripted(), ListQueue(2)
    subject, digits = worker(engine, queue)
    digits.error = RewardError("reward f: prompt 0-1: returned nan")
    with pytest.raises(RewardError, match="returned nan"):
        await subject.run()
    assert queue.groups == []

    engine, queue = scripted(), ListQueue(2)
    subject, digits = worker(engine, queue, reward={"on_error": "skip"})
    digits.error = RewardError("reward f: prompt 0-1: returned nan")
    await subject.run()
    assert sorted(queue.failed) == [("0-0.0", "reward"), ("0-1.0", "reward")]


async def test_an_engine_that_dies_during_a_push_ends_the_run(monkeypatch):
    monkeypatch.setattr("async_rl.rollout.engine.liveness._PERIOD_S", 0.01)
    engine, queue = scripted(length=1000, max_response_tokens=2000), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_num_seqs": 4, "max_response_tokens": 2000})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    engine.dead = True
    with pytest.raises(EngineError, match="the engine died"):
        await asyncio.wait_for(run, 5)


class Straggler(ScriptedEngine):
    """Never finishes a response whose request is named in ``stuck``."""

    stuck = ()

    async def generate(self, request_id, *arguments, **keywords) -> EngineOutput:
        if request_id.startswith(self.stuck):
            await asyncio.sleep(3600)
        return await super().generate(request_id, *arguments, **keywords)


@pytest.mark.parametrize(("needed", "handed_in"), [(2, True), (3, False), (None, False)])
async def test_a_group_over_its_time_is_handed_in_short_or_its_prompt_goes_back(needed, handed_in):
    engine, queue = scripted(kind=Straggler), ListQueue(2)
    engine.stuck = ("0-0.0/1",)
    settings = {"n": 3, "max_num_seqs": 6, "max_response_tokens": 40, "group_timeout_s": 0.05}
    subject, _ = worker(engine, queue, rollout=settings | ({"min_group_size": needed} if needed else {}))
    await subject.run()
    sizes = {group.group_id: len(group.trajectories) for group in queue.groups}
    assert sizes == ({"0-1.0": 3, "0-0.0": 2} if handed_in else {"0-1.0": 3})
    assert queue.returned == ([] if handed_in else [("0-0.0", "timeout")])
    assert await snapshot(subject) == {}
    assert subject.stats().cut_groups == handed_in


class SomeFail(Digits):
    """Fails to score the first so many responses, of those that it is asked for."""

    def __init__(self, failures):
        self.failures = list(failures)

    async def score(self, prompt, response, source="train"):
        if self.failures:
            raise self.failures.pop()
        return await super().score(prompt, response)


FAILED, NOT_APPLICABLE = RewardError("busy"), RewardNotApplicable("returned None")


@pytest.mark.parametrize(
    ("failures", "needed", "on_error", "published"),
    [
        ([FAILED], 2, "skip", 2),
        ([FAILED, NOT_APPLICABLE], 2, "skip", None),
        ([FAILED], None, "skip", None),
        ([NOT_APPLICABLE], 2, "fail", 2),
        ([NOT_APPLICABLE], None, "fail", None),
        ([EngineError("refused")], 2, "fail", 2),
    ],
)
async def test_a_response_that_fails_is_left_out_if_its_group_can_do_without_it(failures, needed, on_error, published):
    engine, queue = scripted(), ListQueue(1)
    rollout = {"n": 3, "max_num_seqs": 3, "max_response_tokens": 40, "min_group_size": needed}
    subject, _ = worker(engine, queue, digits=SomeFail(failures), rollout=rollout, reward={"on_error": on_error})
    await subject.run()
    assert [len(group.trajectories) for group in queue.groups] == ([published] if published else [])
    assert queue.failed == ([] if published else [("0-0.0", "reward")])
    assert subject.stats().cut_groups == bool(published)


async def test_a_reward_that_fails_ends_the_run_if_the_settings_say_so_whatever_the_group_can_do_without():
    rollout = {"n": 3, "max_num_seqs": 3, "max_response_tokens": 40, "min_group_size": 2}
    subject, _ = worker(scripted(), ListQueue(1), digits=SomeFail([FAILED]), rollout=rollout)
    with pytest.raises(RewardError, match="busy"):
        await subject.run()


async def test_time_for_which_the_engine_is_paused_is_not_the_groups_time():
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_response_tokens": 40, "group_timeout_s": 1.0})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    await asyncio.sleep(1.3)
    await subject.wake()
    await subject.resume()
    await run
    assert len(queue.groups) == 2
    assert queue.returned == []


async def test_an_engine_that_hangs_is_taken_for_dead_but_not_during_a_push(monkeypatch):
    monkeypatch.setattr("async_rl.rollout.engine.liveness._PERIOD_S", 0.01)
    engine, queue = scripted(kind=Straggler), ListQueue(2)
    engine.stuck = "0-"
    subject, _ = worker(engine, queue, watchdog={"stall_s": 0.05})
    run = asyncio.create_task(subject.run())
    await asyncio.sleep(0.2)
    assert not run.done()
    subject._gate.close()  # what a push begins with
    engine.hangs = True
    await asyncio.sleep(0.2)
    assert not run.done(), "loading weights takes its time"
    subject._gate.open()
    with pytest.raises(EngineDied, match="has not answered for"):
        await asyncio.wait_for(run, 5)
    assert len(await snapshot(subject)) == 2, "what is in flight can be handed over"


async def test_a_request_that_the_engine_refuses_costs_its_group_only():
    engine, queue = scripted(), ListQueue(5)
    subject, _ = worker(engine, queue)
    generate = engine.generate

    async def refuses_one(request_id, *arguments):
        if request_id.startswith("0-3.0/1"):
            raise EngineError("replica 0: this request cannot be")
        return await generate(request_id, *arguments)

    engine.generate = refuses_one
    await subject.run()
    assert sorted(group.group_id for group in queue.groups) == ["0-0.0", "0-1.0", "0-2.0", "0-4.0"]
    assert queue.failed == [("0-3.0", "engine")]


async def test_an_answer_that_breaks_an_invariant_costs_its_group_only():
    engine, queue = scripted(), ListQueue(3)
    subject, _ = worker(engine, queue)
    generate = engine.generate

    async def spoils_one(request_id, *arguments):
        output = await generate(request_id, *arguments)
        if request_id.startswith("0-1.0/0"):
            output.logprobs[0] = np.nan
        return output

    engine.generate = spoils_one
    await subject.run()
    assert len(queue.groups) == 2
    assert queue.failed == [("0-1.0", "engine")]
