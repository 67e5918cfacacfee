"""A worker whose reward scores whole groups, and what the settings make of responses that are too long."""

import asyncio

import pytest

from async_rl.config.inputs import RewardSection, Terms
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.evaluation import EvalProblem
from async_rl.rollout.rewards.overlong import Overlong
from async_rl.rollout.rewards.score import FinishedResponse, Score
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import Digits, ListQueue, sampled, scripted, snapshot, worker


class Ranks(Digits):
    """Scores the responses of a group by their place in it; ``missing`` have no reward."""

    whole_groups = True

    def __init__(self, missing=(), error=None):
        self.missing, self.error, self.asked = missing, error, []

    async def score_group(self, prompt, responses, source):
        self.asked.append([response.tokens for response in responses])
        if self.error is not None:
            return [self.error] * len(responses)
        none = RewardNotApplicable("returned None")
        return [none if n in self.missing else Score(float(n), {"rank": float(n)}) for n in range(len(responses))]


class LastIsLate(ScriptedEngine):
    """The last response of each group never ends."""

    async def generate(self, request_id, token_ids, sampling, max_tokens, first_row=0):
        if request_id.split("/")[1] == "2":
            await asyncio.sleep(600)
        return await super().generate(request_id, token_ids, sampling, max_tokens, first_row)


THREE = {"n": 3, "max_num_seqs": 6, "max_response_tokens": 40}


async def run(ranks, rollout=THREE, groups=2, kind=ScriptedEngine, **settings):
    queue = ListQueue(groups)
    subject, _ = worker(scripted(length=5, kind=kind), queue, digits=ranks, rollout=rollout, **settings)
    await subject.run()
    return subject, queue


async def test_a_group_is_scored_at_once_when_all_its_responses_have_ended():
    ranks = Ranks()
    subject, queue = await run(ranks)
    assert ranks.asked == [[5, 5, 5]] * 2
    for group in queue.groups:
        assert [(r.reward, r.reward_parts) for r in group.rollouts] == [(n, {"rank": n}) for n in range(3)]
    assert subject.stats().cut_groups == 0


async def test_a_response_without_a_reward_is_left_out_as_far_as_the_group_can_do_without():
    subject, queue = await run(Ranks(missing=[0]), {**THREE, "min_group_size": 2})
    assert [[rollout.reward for rollout in group.rollouts] for group in queue.groups] == [[1.0, 2.0]] * 2
    assert subject.stats().cut_groups == 2
    _, queue = await run(Ranks(missing=[0, 1]), {**THREE, "min_group_size": 2})
    assert queue.groups == []
    assert [reason for _, reason in queue.failed] == ["reward"] * 2


async def test_a_reward_that_fails_ends_the_run_or_costs_the_group():
    with pytest.raises(RewardError, match="busy"):
        await run(Ranks(error=RewardError("busy")))
    _, queue = await run(Ranks(error=RewardError("busy")), reward={"on_error": "skip"})
    assert [reason for _, reason in queue.failed] == ["reward"] * 2


@pytest.mark.parametrize(("missing", "published"), [([], [[0.0, 1.0]] * 2), ([0], [])])
async def test_late_responses_are_left_out_of_what_is_scored(missing, published):
    rollout = {**THREE, "min_group_size": 2, "group_timeout_s": 0.3}
    ranks = Ranks(missing)
    subject, queue = await run(ranks, rollout, kind=LastIsLate)
    assert ranks.asked == [[5, 5]] * 2
    assert [[rollout.reward for rollout in group.rollouts] for group in queue.groups] == published
    assert len(queue.failed) == 2 - len(published)
    assert subject.stats().cut_groups == 2


async def test_a_group_in_flight_whose_responses_have_ended_is_scored_by_the_worker_that_adopts_it():
    class Never(Ranks):
        async def score_group(self, prompt, responses, source):
            await asyncio.sleep(600)

    engine = scripted(length=5)
    subject, _ = worker(engine, ListQueue(1), digits=Never(), rollout=THREE)
    running = asyncio.create_task(subject.run())
    await sampled(engine, 15)
    while not all(p and p.finished for p in next(iter(subject._worker._in_flight.values())).partials):
        await asyncio.sleep(0)
    messages = await snapshot(subject)
    running.cancel()
    ranks, queue = Ranks(), ListQueue(0)
    other, _ = worker(scripted(length=5), queue, digits=ranks, rollout=THREE)
    assert await other.adopt(*messages.values()) == list(messages)
    await other.run()
    assert ranks.asked == [[5, 5, 5]]
    assert [len(group.trajectories) for group in queue.groups] == [3]


# -- too long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0.0), (30, 0.0), (35, -0.25), (40, -0.5)])
def test_the_soft_overlong_punishment_is_that_of_dapo(tokens, penalty):
    """arXiv:2503.14476, equation 13: 0, then (L_max - L_cache - |y|) / L_cache, then -1; times the penalty."""
    overlong = Overlong(RewardSection(overlong_tokens=10, overlong_penalty=0.5))
    score = overlong.shape(FinishedResponse("a", tokens=tokens), Score(1.0, {"right": 1.0}), 40)
    assert score == Score(1.0 + penalty, {"right": 1.0, "overlong": penalty}, raw=1.0)
    assert score.unshaped == 1.0


def test_without_a_setting_nothing_is_shaped_or_left_out():
    overlong, cut = Overlong(RewardSection()), FinishedResponse("a", "length", tokens=40)
    assert overlong.shape(cut, Score(1.0), 40) == Score(1.0)
    assert not overlong.leaves_out(cut)


async def test_a_response_that_is_cut_off_may_be_left_out_of_training_without_a_call_but_not_of_an_evaluation():
    class Counts(Digits):
        calls = 0

        async def score(self, prompt, response, source="train"):
            self.calls += 1
            return await super().score(prompt, response)

    short = {**THREE, "max_response_tokens": 4}
    counts, queue = Counts(), ListQueue(1)
    engine = scripted(length=5, max_response_tokens=4)
    subject, _ = worker(engine, queue, digits=counts, rollout=short, reward={"truncated": "leave_out"})
    await subject.run()
    assert (counts.calls, queue.groups) == (0, [])
    assert queue.failed == [("0-0.0", "reward")]
    prompts = [(await ListQueue(1).take("w", 1))[0].prompt]
    (answer,) = (await subject.evaluate([EvalProblem(Terms("held_out", 4), prompts[0])])).answers
    assert answer.scored.rewards == (4.0,)


async def test_a_group_is_scored_without_the_responses_that_are_cut_off():
    ranks = Ranks()
    rollout = {**THREE, "max_response_tokens": 4}
    queue = ListQueue(1)
    engine = scripted(length=5, max_response_tokens=4)
    subject, _ = worker(engine, queue, digits=ranks, rollout=rollout, reward={"truncated": "leave_out"})
    await subject.run()
    assert (ranks.asked, queue.groups, len(queue.failed)) == ([], [], 1)
