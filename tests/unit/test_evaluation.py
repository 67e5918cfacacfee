"""Evaluation on a replica with a scripted engine; with the real one it is in tests/integration/test_pipeline.py."""

import asyncio

import numpy as np
import pytest

from async_rl.config.inputs import Terms
from async_rl.errors import EngineDied, EngineError, RewardError
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.evaluation import EvalProblem
from async_rl.types import Prompt
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import ListQueue, sampled, scripted, worker

PROMPTS = [Prompt(f"eval-{n}", n, "abc", np.array([5, 6, 7], dtype=np.int32)) for n in range(3)]
PROBLEMS = [EvalProblem(Terms("held_out", 40), prompt) for prompt in PROMPTS]


class Uneven(ScriptedEngine):
    """The responses to the three problems have 4, 5 and 6 tokens. Notes how it was asked to sample."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.samplings = []

    async def generate(self, request_id, token_ids, sampling, max_tokens, first_row=0):
        self.samplings.append(sampling)
        return await super().generate(request_id, token_ids, sampling, max_tokens, first_row)

    def last_position(self, trajectory_id, response):
        return 3 + int(trajectory_id.split("/")[1][-1])


def evaluator(engine, failing=(), on_error="skip"):
    """Rewards are the number of tokens; on the problems ``failing`` the reward function fails."""
    subject, digits = worker(engine, ListQueue(0), reward={"on_error": on_error})
    count = digits.score

    async def score(prompt, response, source):
        if prompt.row in failing:
            raise RewardError(f"reward f: prompt {prompt.prompt_id}: returned nan")
        return await count(prompt, response)

    digits.score = score
    return subject


async def test_the_mean_over_the_problems_at_the_version_of_the_weights():
    engine = scripted(kind=Uneven)
    engine.version = 7
    result = await evaluator(engine).evaluate(PROBLEMS)
    assert result.version == 7
    assert [answer.scored.rewards for answer in result.answers] == [(4.0,), (5.0,), (6.0,)]
    assert [answer.scored.tokens for answer in result.answers] == [(4,), (5,), (6,)]
    assert all(sampling.greedy for sampling in engine.samplings)
    assert len(engine.samplings) == 3


async def test_k_responses_to_each_problem_sampled_as_its_set_says():
    engine, sampling = scripted(kind=Uneven), Sampling(0.6, 0.9, top_k=20)
    problems = [
        EvalProblem(Terms("aime", 40), prompt, 3, sampling, "2024", shown=prompt.row == 1) for prompt in PROMPTS[:2]
    ]
    result = await evaluator(engine).evaluate([*problems, PROBLEMS[2]])
    assert [len(answer.scored.rewards) for answer in result.answers] == [3, 3, 1]
    assert [answer.set for answer in result.answers] == ["aime", "aime", "held_out"]
    assert engine.samplings.count(sampling) == 6
    assert len({request for request, *_ in engine.requests}) == 7, "each response is a call of its own"
    first, second, *_ = result.answers
    assert (first.shown, second.shown.reward, len(second.shown.response_ids)) == (None, 5.0, 5)
    assert (first.scored.source, first.scored.truncated) == ("2024", 0)


async def test_responses_that_end_at_the_limit_are_counted_and_no_more_are_under_way_than_there_are_places():
    class Counts(ScriptedEngine):
        under_way = most = 0

        async def generate(self, *arguments, **keywords):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                return await super().generate(*arguments, **keywords)
            finally:
                self.under_way -= 1

    engine = scripted(length=50, kind=Counts)
    result = await evaluator(engine).evaluate([EvalProblem(Terms("aime", 40), prompt, 4) for prompt in PROMPTS])
    assert [answer.scored.truncated for answer in result.answers] == [4, 4, 4]
    assert engine.most == 4, "rollout.max_num_seqs"


async def test_a_problem_on_which_the_reward_fails_is_left_out():
    result = await evaluator(scripted(kind=Uneven), failing=[2]).evaluate(PROBLEMS)
    assert [answer.scored and answer.scored.rewards for answer in result.answers] == [(4.0,), (5.0,), None]


@pytest.mark.parametrize("fault", [EngineError("the engine failed the call 4 times"), EngineDied("it crashed")])
async def test_a_request_that_the_engine_cannot_answer_costs_its_problem_and_a_dead_engine_the_result(fault):
    engine = scripted(kind=Uneven)
    generate = engine.generate

    async def fails_on_one(request_id, *arguments):
        if request_id.startswith("eval/eval-1"):
            raise fault
        return await generate(request_id, *arguments)

    engine.generate = fails_on_one
    subject = evaluator(engine, on_error="fail")
    if isinstance(fault, EngineDied):
        with pytest.raises(EngineDied):
            await subject.evaluate(PROBLEMS)
    else:
        assert sum(answer.scored is not None for answer in (await subject.evaluate(PROBLEMS)).answers) == 2


async def test_a_reward_that_fails_ends_the_run_where_it_is_to_or_on_all_problems():
    with pytest.raises(RewardError, match="prompt eval-1: returned nan"):
        await evaluator(scripted(kind=Uneven), failing=[1], on_error="fail").evaluate(PROBLEMS)
    with pytest.raises(RewardError, match="each of 3 evaluation problems failed"):
        await evaluator(scripted(kind=Uneven), failing=[0, 1, 2]).evaluate(PROBLEMS)


async def test_weights_that_change_meanwhile_are_noticed():
    engine = scripted(kind=Uneven)
    evaluation = asyncio.create_task(evaluator(engine).evaluate(PROBLEMS))
    await sampled(engine, 3)
    engine.version += 1
    with pytest.raises(EngineError, match="from version 0 to 1 during an evaluation"):
        await evaluation


async def test_an_evaluation_that_is_cut_is_no_result():
    engine = scripted(kind=Uneven)
    evaluation = asyncio.create_task(evaluator(engine).evaluate(PROBLEMS))
    await sampled(engine, 3)
    await engine.pause("abort")
    await engine.resume()
    with pytest.raises(EngineError, match="an evaluation was aborted"):
        await evaluation
