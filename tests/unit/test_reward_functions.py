"""Rewards of a run put together: several with weights, of whole groups, and functions in verl's and TRL's form."""

import asyncio
import importlib
import os
import sys

import numpy as np
import pytest

from async_rl.config.inputs import RewardSection
from async_rl.config.loading import load, parse_overrides, validate
from async_rl.errors import ConfigError, RewardError, RewardNotApplicable
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse, Score, weighted_sum
from async_rl.types import Prompt

FIELDS = {
    "data_source": "openai/gsm8k",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 3},
    "answer": "72",
}


def prompt(**fields) -> Prompt:
    return Prompt("0-17", 17, "48 + 24 = ?", np.array([1], np.int32), fields or FIELDS)


def response(text: str, tokens: int = 3) -> FinishedResponse:
    return FinishedResponse(text, completion_ids=np.arange(tokens, dtype=np.int32), tokens=tokens)


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """Write a module of rewards and return a function that makes a runner for the settings."""
    made = []

    def make(source: str, **settings) -> RewardRunner:
        sys.modules.pop("their_rewards", None)
        (tmp_path / "their_rewards.py").write_text(source)
        importlib.invalidate_caches()
        made.append(RewardRunner(RewardSection.model_validate({"retries": 0} | settings)))
        return made[-1]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    for runner in made:
        runner.close()
    sys.modules.pop("their_rewards", None)


# -- several with weights ---------------------------------------------------------------------------------------------


def test_a_weighted_sum_keeps_each_reward_as_a_part_and_leaves_out_what_does_not_apply():
    weights = {"right": 1.0, "form": 0.2, "short": -0.5}
    scores = [Score(1.0, {"digits": 2.0}), Score(0.5), Score(2.0)]
    parts = {"right": 1.0, "right/digits": 2.0, "form": 0.5, "short": 2.0}
    assert weighted_sum(weights, scores) == Score(pytest.approx(0.1), parts)
    assert weighted_sum(weights, [None, Score(0.5), None]) == Score(pytest.approx(0.1), {"form": 0.5})
    assert weighted_sum(weights, [None, None, None]) is None


SEVERAL = """
def right(response, answer): return {"score": response == answer, "length": len(response)}
async def form(prompt, response): return 0.5 if response else None
"""


async def test_several_rewards_of_any_kind_are_summed(rewards):
    functions = {
        "right": {"function": "their_rewards:right"},
        "form": {"function": "their_rewards:form", "weight": 0.2},
    }
    runner = rewards(SEVERAL, functions=functions)
    assert not runner.whole_groups
    score = await runner.score(prompt(), response("72"))
    assert score == Score(pytest.approx(1.1), {"right": 1.0, "right/length": 2.0, "form": 0.5})
    assert (await runner.score(prompt(), response(""))).parts == {"right": 0.0, "right/length": 0.0}


async def test_one_reward_that_fails_or_none_that_applies_is_named(rewards):
    source = "def no(response): return None\nasync def fails(response): raise KeyError('level')\n"
    both = {"no": {"function": "their_rewards:no"}, "also": {"function": "their_rewards:no"}}
    with pytest.raises(RewardNotApplicable, match=r"^reward\.functions, prompt 0-17 .dataset row 17.: returned None"):
        await rewards(source, functions=both).score(prompt(), response("a"))
    runner = rewards(source, functions={**both, "fails": {"function": "their_rewards:fails"}})
    with pytest.raises(RewardError, match=r"^reward\.functions\.fails their_rewards:fails, prompt 0-17 .*'level'$"):
        await runner.score(prompt(), response("a"))


async def test_arguments_of_the_settings_stand_in_place_of_columns(rewards):
    source = "def reward(response, *, answer, scale=1.0): return scale * (response == answer)\n"
    runner = rewards(source, function="their_rewards:reward", arguments={"answer": "mine", "scale": 0.5})
    assert (await runner.score(prompt(), response("mine"))).reward == 0.5
    with pytest.raises(RewardError, match=r"cannot be called as f\(\.\.\., other=\.\.\.\), which its settings ask for"):
        rewards(source, function="their_rewards:reward", arguments={"other": 1})


async def test_names_of_parts_without_end_are_refused(rewards):
    source = "def reward(prompt, response): return {'score': 1.0, f'row{response}': 1.0}\n"
    runner = rewards(source, function="their_rewards:reward")
    for n in range(32):
        await runner.score(prompt(), response(str(n)))
    await runner.score(prompt(), response("31"))
    with pytest.raises(RewardError, match="parts of new names, row32; each name is a metric, and a reward has at most"):
        await runner.score(prompt(), response("32"))


CONFIG = """
model: {path: model}
data: {train: train.jsonl}
reward:
  functions:
    right: {function: "verl:my:compute_score"}
    form: {function: my:form, weight: 0.2, slow: true}
"""


def test_weights_are_set_in_the_file_and_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    flags = ["--reward.functions.form.weight", "0.5", "--reward.functions.short.function", "my:short"]
    functions = load(tmp_path / "run.yaml", parse_overrides(flags)).reward.functions
    assert {name: (each.function, each.weight) for name, each in functions.items()} == {
        "right": ("verl:my:compute_score", 1.0),
        "form": ("my:form", 0.5),
        "short": ("my:short", 1.0),
    }


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"functions": {"a": {"wieght": 1.0, "function": "m:f"}}}, "reward.functions.a.wieght: no such setting"),
        ({"functions": {"a": {"weight": 1.0}}}, "reward.functions.a.function: required, but missing"),
        ({"functions": {"a": {"function": "f"}}}, "reward.functions.a.function: 'f' is not valid"),
        ({"functions": {"1": {"function": "m:f"}}}, "reward.functions.1"),
        (
            {"functions": {"a": {"function": "m:f"}}, "function": "m:g"},
            "reward.function is set beside reward.functions",
        ),
        ({"function": "other:m:f"}, "reward.function: 'other:m:f' is not valid"),
        ({"overlong_tokens": 2000}, "reward.overlong_tokens is 2000, more than rollout.max_response_tokens"),
    ],
)
def test_what_cannot_be_rewards_is_refused_by_its_key(reward, message):
    with pytest.raises(ConfigError) as error:
        validate({"model": {"path": "model"}, "data": {"train": "train.jsonl"}, "reward": reward})
    assert message in str(error.value)


# -- verl -------------------------------------------------------------------------------------------------------------

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "openai/gsm8k" and extra_info["index"] == 3
    correct = solution_str.strip() == ground_truth
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": solution_str}

def plain(solution_str, ground_truth, method="strict", **kwargs):
    return float(solution_str == ground_truth) * kwargs["extra_info"]["index"]
"""


async def test_verls_compute_score_is_called_as_verl_calls_it(rewards):
    runner = rewards(VERL, function="verl:their_rewards:compute_score")
    assert await runner.score(prompt(), response("72")) == Score(1.0, {"acc": 1.0})
    assert await runner.score(prompt(), response("71")) == Score(-1.0, {"acc": 0.0})
    runner = rewards(VERL, function="verl:their_rewards:plain")
    assert await runner.score(prompt(), response("72")) == Score(3.0)


async def test_arguments_of_the_settings_stand_in_place_of_what_verl_would_pass(rewards):
    arguments = {"data_source": "openai/gsm8k", "extra_info": {"index": 3}}
    runner = rewards(VERL, function="verl:their_rewards:compute_score", arguments=arguments)
    assert (await runner.score(prompt(ground_truth="72"), response("72"))).reward == 1.0
    with pytest.raises(RewardError, match=r"cannot be called as compute_score\(.*method=\.\.\.\): got an unexpected"):
        rewards(VERL, function="verl:their_rewards:compute_score", arguments={"method": "strict"})


async def test_a_row_that_is_not_verls_is_refused_by_the_field_it_lacks(rewards):
    runner = rewards(VERL, function="verl:their_rewards:compute_score")
    with pytest.raises(RewardError, match=r"row 17.: the dataset row needs a field 'data_source' .* has answer$"):
        await runner.score(prompt(answer="72"), response("72"))
    with pytest.raises(RewardError, match=r"needs reward_model\.ground_truth, or ground_truth, .* has data_source$"):
        await runner.score(prompt(data_source="openai/gsm8k"), response("72"))
    with pytest.raises(RewardError, match=r"'verl:their_rewards:other' cannot be called as compute_score\("):
        rewards("def other(solution, truth): return 1.0\n", function="verl:their_rewards:other")


# -- TRL --------------------------------------------------------------------------------------------------------------

TRL = """
calls = []

def best_of_group(prompts, completions, answer, **kwargs):
    calls.append((prompts, completions, answer, kwargs))
    lengths = [len(text) for text in completions]
    return [None if not text else float(text == a and len(text) == max(lengths))
            for text, a in zip(completions, answer)]

async def chat(prompts, completions, completion_ids):
    assert prompts[0][0]["role"] == "user"
    return [float(len(c[0]["content"]) + len(ids)) for c, ids in zip(completions, completion_ids)]

def short(completions): return [1.0] * (len(completions) - 1)
def number(completions): return 1.0
def array(completions):
    import numpy
    return numpy.ones(len(completions))
def needs(completions, solution): return []
"""


async def test_trls_reward_is_called_once_for_a_group_with_lists_of_columns(rewards):
    runner = rewards(TRL, function="trl:their_rewards:best_of_group")
    assert runner.whole_groups
    scores = await runner.score_group(prompt(), [response("72"), response(""), response("7")])
    assert scores[0] == Score(1.0)
    assert isinstance(scores[1], RewardNotApplicable)
    assert scores[2] == Score(0.0)
    ((prompts, completions, answer, others),) = sys.modules["their_rewards"].calls
    assert (prompts, completions, answer) == (["48 + 24 = ?"] * 3, ["72", "", "7"], ["72"] * 3)
    assert others["data_source"] == ["openai/gsm8k"] * 3
    assert others["completion_ids"] == [[0, 1, 2]] * 3
    assert await runner.score(prompt(), response("72")) == Score(1.0), "an evaluation has one response for each prompt"


async def test_trls_reward_of_a_conversation_gets_messages(rewards):
    runner = rewards(TRL, function="trl:their_rewards:chat")
    row = prompt(prompt=[{"role": "user", "content": "48 + 24 = ?"}])
    assert await runner.score_group(row, [response("72"), response("7", tokens=1)]) == [Score(5.0), Score(2.0)]


async def test_an_array_of_rewards_is_a_list(rewards):
    runner = rewards(TRL, function="trl:their_rewards:array")
    assert await runner.score_group(prompt(), [response("a"), response("b")]) == [Score(1.0)] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "returned 1 rewards for 2 responses; expected one for each"),
        ("number", "returned 1.0 of type float; expected a list with a number or None for each response"),
        ("needs", r"the dataset row needs a field 'solution' for this reward; row 17 has data_source"),
    ],
)
async def test_what_trls_reward_does_wrong_is_the_error_of_each_response(rewards, function, message):
    runner = rewards(TRL, function=f"trl:their_rewards:{function}")
    for error in await runner.score_group(prompt(), [response("a"), response("b")]):
        assert str(error).startswith(f"reward.function trl:their_rewards:{function}, prompt 0-17 (dataset row 17): ")
        assert message in str(error)


async def test_a_slow_reward_of_whole_groups_runs_in_a_process(rewards):
    source = "import os\ndef reward(completions, **columns): return [float(os.getpid()) for _ in completions]\n"
    runner = rewards(source, function="trl:their_rewards:reward", slow=True, workers=1)
    first, second = await runner.score_group(prompt(), [response("a"), response("b")])
    assert first == second
    assert first.reward != float(os.getpid())


async def test_rewards_of_groups_and_of_responses_are_summed(rewards):
    functions = {
        "best": {"function": "trl:their_rewards:best_of_group"},
        "length": {"function": "their_rewards:length", "weight": 0.1},
    }
    source = TRL + "async def length(response):\n    if response == 'bad': raise ValueError\n    return len(response)\n"
    runner = rewards(source, functions=functions)
    good, none, bad = await runner.score_group(prompt(), [response("72"), response(""), response("bad")])
    assert good == Score(pytest.approx(0.2), {"best": 0.0, "length": 2.0}), "the third is longer"
    assert none == Score(0.0, {"length": 0.0})
    assert "reward.functions.length their_rewards:length, prompt 0-17 (dataset row 17): raised ValueError" in str(bad)


async def test_cancelling_a_group_cancels_its_calls(rewards):
    source = (
        "import asyncio\nended = []\n"
        "async def waits(response):\n"
        "    try: await asyncio.sleep(600)\n"
        "    finally: ended.append(response)\n"
        "def group(completions): return [1.0] * len(completions)\n"
    )
    functions = {"waits": {"function": "their_rewards:waits"}, "group": {"function": "trl:their_rewards:group"}}
    runner = rewards(source, functions=functions, timeout_s=600.0)
    scoring = asyncio.create_task(runner.score_group(prompt(), [response("a"), response("b")]))
    await asyncio.sleep(0.1)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    assert sorted(sys.modules["their_rewards"].ended) == ["a", "b"]
