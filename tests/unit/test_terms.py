"""What holds for one source or evaluation set alone: rewards, limits of responses, environments."""

import asyncio
import dataclasses
import importlib
import sys

import numpy as np
import pytest

from async_rl.config.inputs import RewardSection, Terms
from async_rl.config.loading import validate
from async_rl.errors import ConfigError, RewardNotApplicable
from async_rl.queue.records import Ticket
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.environments.named import environments_of
from async_rl.rollout.environments.turns import load_environments
from async_rl.rollout.evaluation import EvalProblem
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse
from async_rl.trainer.samples import group_samples
from async_rl.types import Prompt
from tests.support.groups import grouped, rewarded
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import Digits, ListQueue, push, sampled, scripted, worker
from tests.unit.test_samples import trajectory
from tests.unit.test_worker_environment import Answers, TurnEngine

SOURCES = {
    "math": {"path": "math.jsonl", "max_response_tokens": 30},
    "code": {"path": "code.jsonl", "environment": "tools:shell"},
}
SETS = {
    "aime": {"path": "aime.jsonl", "max_response_tokens": 80},
    "game": {"path": "g.jsonl", "environment": "my:game"},
}
RIGHT = {"function": "sourced_rewards:right", "applies_to": ["math", "aime"]}
RANKS = {"function": "trl:sourced_rewards:ranks", "applies_to": ["code"]}
FORM = {"function": "sourced_rewards:form", "weight": 0.5}


def config(**sections):
    tree = {
        "model": {"path": "model"},
        "data": {"sources": SOURCES, "eval": "eval.jsonl"},
        "rollout": {"max_response_tokens": 40},
        "eval": {"sets": SETS},
    }
    return validate(tree | sections)


def refusal(**sections) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    return str(caught.value)


def prompt(prompt_id="math/0-0") -> Prompt:
    return Prompt(prompt_id, 1, "abc", np.array([5, 6, 7], dtype=np.int32))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_source_or_set_has_its_own_terms_where_it_says_so():
    found = config()
    assert found.terms("math") == Terms("math", 30, None)
    assert found.terms("code") == Terms("code", 40, "tools:shell")
    assert found.eval_terms("aime") == Terms("aime", 80, None)
    assert found.eval_terms("held_out") == Terms("held_out", 40, None)
    assert found.longest_response == 80
    every = config(rollout={"max_response_tokens": 100, "environment": {"function": "my:tools"}})
    assert every.terms("math").environment == every.eval_terms("held_out").environment == "my:tools"
    assert every.terms("code").environment == "tools:shell"
    assert every.longest_response == 100


def test_the_prompts_of_data_train_have_the_terms_of_the_run():
    assert config(data={"train": "train.jsonl"}, eval={}).terms("") == Terms("train", 40, None)


def test_a_source_and_a_row_say_how_they_are_sampled():
    sources = {
        "math": {"path": "m.jsonl", "temperature": 0.6, "stop": ["</a>"], "stop_token_ids": [7]},
        "code": {"path": "c"},
    }
    rollout = {"max_response_tokens": 40, "temperature": 0.9, "stop": ["end"], "stop_token_ids": [3]}
    found = config(data={"sources": sources, "sampling_field": "how"}, rollout=rollout, eval={})
    assert found.terms("math") == Terms("math", 40, None, 0.6, ("end", "</a>"), (3, 7))
    assert found.terms("code") == Terms("code", 40, None, 0.9, ("end",), (3,))
    how = {"temperature": 1.5, "max_response_tokens": 20, "stop": ["!"], "stop_token_ids": [8]}
    assert found.terms("math", {"how": how}) == Terms("math", 20, None, 1.5, ("end", "</a>", "!"), (3, 7, 8))
    assert found.terms("code", {"how": {"temperature": 2}}) == Terms("code", 40, None, 2.0, ("end",), (3,))
    assert found.terms("code", {"other": how}) == found.terms("code", {"how": None}) == found.terms("code")
    assert config().terms("math", {"how": how}) == config().terms("math"), "no field is read unless it is named"


def test_a_limit_above_that_of_the_run_and_a_penalty_without_room_are_refused():
    longer = {"sources": {"math": {"path": "math.jsonl", "max_response_tokens": 41}}}
    assert "data.sources.math.max_response_tokens is 41, more than rollout.max_response_tokens (40)" in refusal(
        data=longer
    )
    assert "overlong_tokens is 31, more than data.sources.math.max_response_tokens (30)" in refusal(
        reward={"overlong_tokens": 31}
    )
    config(reward={"overlong_tokens": 30})


def test_a_reward_for_nothing_and_a_source_or_set_without_one_are_refused():
    unknown = {"functions": {"form": FORM, "right": {**RIGHT, "applies_to": ["math", "train"]}}}
    assert (
        "reward.functions.right.applies_to has train, but no source and no evaluation set has this name; it is one of "
        "math, code, held_out, aime, game"
    ) in refusal(reward=unknown)
    without = {"functions": {"right": {**RIGHT, "applies_to": ["math", "code", "aime", "game"]}}}
    assert "none of reward.functions (right) applies to held_out" in refusal(reward=without)
    assert "none of reward.functions (right, ranks) applies to held_out" in refusal(
        reward={"functions": {"right": RIGHT, "ranks": RANKS}}
    )
    config(reward={"functions": {"right": RIGHT, "ranks": RANKS, "form": FORM}})


def test_each_environment_is_loaded_once_and_named_by_the_setting_that_names_it_first():
    sets = {**SETS, "shell": {"path": "s.jsonl", "environment": "tools:shell"}}
    found = environments_of(config(eval={"sets": sets}))
    assert found == {"tools:shell": "data.sources.code.environment", "my:game": "eval.sets.game.environment"}
    assert load_environments(config(data={"train": "train.jsonl"}, eval={}), None) == {}


# -- rewards ----------------------------------------------------------------------------------------------------------

THEIRS = """
def right(response): return float(response == "yes")
def form(response): return {"score": len(response), "words": 1}
def ranks(prompts, completions, **columns): return [float(at) for at in range(len(completions))]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "sourced_rewards.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    made = []

    def make(**functions):
        made.append(RewardRunner(RewardSection.model_validate({"functions": functions})))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
    sys.modules.pop("sourced_rewards", None)


async def test_only_the_rewards_of_a_source_or_set_score_its_responses(rewards):
    runner, yes = rewards(right=RIGHT, form=FORM), FinishedResponse("yes")
    of_math = await runner.score(prompt(), yes, "math")
    assert (of_math.reward, dict(of_math.parts)) == (2.5, {"right": 1.0, "form": 3.0, "form/words": 1.0})
    of_game = await runner.score(prompt(), yes, "game")
    assert (of_game.reward, dict(of_game.parts)) == (1.5, {"form": 3.0, "form/words": 1.0})


async def test_a_reward_of_whole_groups_is_called_for_its_sources_alone(rewards):
    runner, two = rewards(ranks=RANKS, form=FORM), [FinishedResponse("a"), FinishedResponse("a")]
    assert [score.reward for score in await runner.score_group(prompt(), two, "code")] == [0.5, 1.5]
    assert [score.reward for score in await runner.score_group(prompt(), two, "math")] == [0.5, 0.5]


async def test_a_single_reward_that_does_not_apply_gives_no_score(rewards):
    runner = rewards(right=RIGHT)
    with pytest.raises(RewardNotApplicable, match=r"reward\.functions\.right"):
        await runner.score(prompt(), FinishedResponse("yes"), "code")


# -- responses --------------------------------------------------------------------------------------------------------


class SourcedQueue(ListQueue):
    """Its groups are of these prompts."""

    def __init__(self, *prompt_ids) -> None:
        super().__init__(0)
        self.waiting = [Ticket(f"{name}.0", prompt(name), 0) for name in prompt_ids]

    async def take(self, worker, limit):
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken


async def test_each_response_has_the_limit_of_its_source_and_a_penalty_by_it():
    sources = {"math": {"path": "m.jsonl", "max_response_tokens": 5}, "code": {"path": "c.jsonl"}}
    queue, reward = SourcedQueue("math/0-0", "code/0-0"), {"overlong_tokens": 4, "overlong_penalty": 0.5}
    subject, _ = worker(scripted(8, sources=sources), queue, data={"sources": sources}, reward=reward)
    await subject.run()
    found = {
        group.group_id: [(len(t.response_ids), t.finish_reason, reward) for t, reward in rewarded(group)]
        for group in queue.groups
    }
    assert found == {"math/0-0.0": [(5, "length", 4.5)] * 2, "code/0-0.0": [(8, "stop", 8.0)] * 2}


class Asked(ScriptedEngine):
    """Keeps how it was asked to sample, by trajectory."""

    asked: dict[str, Sampling]

    async def generate(self, request_id, token_ids, sampling, max_tokens, first_row=0):
        self.asked[request_id.partition(".")[0]] = sampling
        return await super().generate(request_id, token_ids, sampling, max_tokens, first_row)


class Text(Digits):
    def decode(self, ids, **_):
        return super().decode(ids)


@pytest.mark.parametrize("cut", [False, True])
async def test_each_response_is_sampled_and_stopped_as_its_source_and_row_say(cut):
    sources = {"math": {"path": "m.jsonl", "temperature": 0.5, "stop_token_ids": [9]}, "code": {"path": "c.jsonl"}}
    queue = SourcedQueue("math/0-0", "code/0-0", "code/0-1")
    row = {"how": {"temperature": 1.5, "stop": ["4 5"]}}
    queue.waiting[2] = Ticket("code/0-1.0", dataclasses.replace(prompt("code/0-1"), fields=row), 0)
    engine = scripted(12, kind=Asked, sources=sources)
    engine.asked = {}
    subject, _ = worker(engine, queue, data={"sources": sources, "sampling_field": "how"}, digits=Text())
    if cut:
        running = asyncio.create_task(subject.run())
        await sampled(engine, 14)
        await push(subject, engine)
        await running
    else:
        await subject.run()
    found = {group.group_id: {len(t.response_ids) for t in group.trajectories} for group in queue.groups}
    assert found == {"math/0-0.0": {9}, "code/0-0.0": {12}, "code/0-1.0": {5}}
    assert {name: (how.temperature, how.stop, how.stop_token_ids) for name, how in engine.asked.items()} == {
        "math/0-0": (0.5, (), (9,)),
        "code/0-0": (1.0, (), ()),
        "code/0-1": (1.5, ("4 5",), ()),
    }


def test_what_a_row_asks_for_is_what_it_is_trained_with():
    sources = {"math": {"path": "m.jsonl", "temperature": 0.5}, "code": {"path": "c.jsonl"}}
    settings = config(data={"sources": sources, "sampling_field": "how"}, eval={})
    found = {}
    for prompt_id, fields in (("math/0-0", {}), ("code/0-0", {}), ("code/0-1", {"how": {"temperature": 1.5}})):
        asked = dataclasses.replace(prompt(prompt_id), fields=fields)
        group = grouped(f"{prompt_id}.0", asked, [trajectory(prompt_id)])
        (sample,) = group_samples(group, settings, oldest_version=0)
        (found[prompt_id],) = set(sample.temperature[sample.loss_mask].tolist())
    assert found == {"math/0-0": 0.5, "code/0-0": 1.0, "code/0-1": 1.5}


async def test_only_a_source_with_an_environment_has_several_turns():
    sources = {"math": {"path": "m.jsonl"}, "code": {"path": "c.jsonl", "environment": "tests:environment"}}
    queue, environment = SourcedQueue("math/0-0", "code/0-0"), Answers(turns=2)
    subject, _ = worker(scripted(kind=TurnEngine, sources=sources), queue, data={"sources": sources})
    subject._responses._environments = {"tests:environment": environment}
    await subject.run()
    turns = {group.group_id: {int((~t.sampled).sum()) for t in group.trajectories} for group in queue.groups}
    assert turns == {"math/0-0.0": {0}, "code/0-0.0": {4}}


async def test_a_problem_is_answered_and_scored_on_the_terms_of_its_set():
    asked = []

    class Notes(Digits):
        async def score(self, prompt, response, source="train"):
            asked.append(source)
            return await super().score(prompt, response)

    engine, environment = scripted(kind=TurnEngine), Answers(turns=1)
    subject, _ = worker(engine, ListQueue(0), digits=Notes(), environment=environment)
    short, game = Terms("short", 3), Terms("game", 40, "tests:environment")
    result = await subject.evaluate(
        [EvalProblem(short, prompt("eval-short-0")), EvalProblem(game, prompt("eval-game-0"))]
    )
    assert [(answer.set, answer.scored.tokens, answer.scored.truncated) for answer in result.answers] == [
        ("short", (3,), 1),
        ("game", (4 + 2 + 4,), 0),
    ]
    assert sorted(asked) == ["game", "short"]
