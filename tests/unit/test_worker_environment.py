"""A replica with a scripted engine and an environment: turns, waiting for tools, failures."""

import asyncio

import numpy as np
import pytest

from async_rl.errors import EnvironmentFailure
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import EOS, ListQueue, push, sampled, scripted, turns, worker


class Answers:
    """An environment that answers each turn with two tokens, until ``turns`` have been answered."""

    error: Exception | None = None

    def __init__(self, turns: int) -> None:
        self.turns, self.heard = turns, []

    async def answer(self, prompt, turns, texts):
        if self.error is not None:
            raise self.error
        self.heard.append([turn.tolist() for turn in turns])
        return np.array([90, 91], dtype=np.int32) if len(turns) // 2 < self.turns else None

    def close(self) -> None:
        """Nothing to close."""


class TurnEngine(ScriptedEngine):
    """Ends each turn after four tokens, whatever was said before."""

    def last_position(self, trajectory_id, response):
        answered = [i for i, token in enumerate(response) if token == 91]
        return (answered[-1] + 1 if answered else 0) + 3


@pytest.mark.parametrize(("routing", "cuts"), [("replace", 0), ("replace", 3), ("preserve", 3), ("exact", 3)])
async def test_an_environment_answers_each_turn_and_interruptions_do_not_matter(routing, cuts):
    engine, queue, environment = scripted(kind=TurnEngine), ListQueue(2), Answers(turns=2)
    partial = {"partial_rollout": {"routing": routing}}
    subject, _ = worker(engine, queue, environment=environment, async_training=partial)
    run = asyncio.create_task(subject.run())
    for _ in range(cuts):
        await sampled(engine, 10)
        await push(subject, engine)
    await run
    for trajectory in (t for group in queue.groups for t in group.trajectories):
        sampled_ids = trajectory.response_ids[trajectory.sampled].tolist()
        assert trajectory.response_ids[~trajectory.sampled].tolist() == [90, 91] * 2
        assert sampled_ids.count(EOS) == 3
        assert len(trajectory.response_ids) == 3 * 4 + 2 * 2
        assert np.isnan(trajectory.logprobs[~trajectory.sampled]).all()
    assert [len(turns) for turns in environment.heard].count(5) == 4, "the third turn of each of four responses"


class Waits(Answers):
    """An environment of which every call waits until the test lets it go."""

    def __init__(self) -> None:
        super().__init__(turns=1)
        self.let_go = asyncio.Event()

    async def answer(self, prompt, turns, texts):
        answer = await super().answer(prompt, turns, texts)
        await self.let_go.wait()
        return answer


@pytest.mark.parametrize(("limit", "waiting"), [(None, 4), (8, 8)])
async def test_trajectories_that_wait_for_tools_leave_the_engine_to_others(limit, waiting):
    engine, queue, environment = scripted(kind=TurnEngine), ListQueue(10), Waits()
    limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "max_trajectories": limit}
    subject, _ = worker(engine, queue, environment=environment, rollout=limits)
    run = asyncio.create_task(subject.run())
    await turns(500)
    assert len(environment.heard) == waiting, "as many as the replica may have unfinished, and no more"
    environment.let_go.set()
    await run
    assert len(queue.groups) == 10


async def test_the_last_turn_is_not_answered():
    engine, queue, environment = scripted(kind=TurnEngine, max_response_tokens=400), ListQueue(1), Answers(turns=100)
    limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 400, "environment": {"max_turns": 3}}
    subject, _ = worker(engine, queue, environment=environment, rollout=limits)
    await subject.run()
    for trajectory in queue.groups[0].trajectories:
        assert (trajectory.response_ids == EOS).sum() == 3
        assert trajectory.response_ids[-1] == EOS


async def test_environment_failure_ends_the_run_or_the_group_as_configured():
    for on_error in ("fail", "skip"):
        engine, queue, environment = scripted(kind=TurnEngine), ListQueue(2), Answers(turns=1)
        environment.error = EnvironmentFailure("environment f: prompt 0-1: raised KeyError")
        limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "environment": {"on_error": on_error}}
        subject, _ = worker(engine, queue, environment=environment, rollout=limits)
        if on_error == "fail":
            with pytest.raises(EnvironmentFailure, match="raised KeyError"):
                await subject.run()
        else:
            await subject.run()
            assert sorted(queue.failed) == [("0-0.0", "environment"), ("0-1.0", "environment")]
