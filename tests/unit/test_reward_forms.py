"""The rewards that come with the package for the form of a response, and for answers of mathematics."""

import importlib.util
import sys

import numpy as np
import pytest

from async_rl.config.inputs import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards.formats import json_schema, regex
from async_rl.rollout.rewards.loader import load_reward
from async_rl.rollout.rewards.named import NamedReward
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse, Score
from async_rl.types import Prompt


def prompt(**fields) -> Prompt:
    return Prompt("0-17", 17, "1 / 2 = ?", np.array([1], np.int32), fields)


THINKS = r"<think>.*</think>\s*<answer>[^<]*</answer>"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>one\ntwo</think>\n<answer>3</answer>", 1.0),
        (" <think></think><answer>3</answer>\n", 1.0),
        ("<think>one</think><answer>3</answer> and more", 0.0),
        ("<answer>3</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_whole_response_matches_the_pattern(response, reward):
    assert regex(response, pattern=THINKS) == reward


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(RewardError, match=r"the pattern '\(' is no regular expression: missing \)"):
        regex("a", pattern="(")


async def test_a_pattern_that_backtracks_for_ever_costs_a_call_and_not_the_worker():
    settings = {"function": "async_rl.rollout.rewards.formats:regex", "arguments": {"pattern": "(a+)+b"}}
    runner = RewardRunner(RewardSection.model_validate({**settings, "timeout_s": 1.0, "workers": 1}))
    try:
        assert await runner.score(prompt(), FinishedResponse("aab")) == Score(1.0)
        with pytest.raises(RewardError, match=r"formats:regex, .*: did not return within reward\.timeout_s"):
            await runner.score(prompt(), FinishedResponse("a" * 40))
        assert runner.killed == 1
    finally:
        runner.close()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer", "minimum": 1}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('{"name": "a", "n": 2}', 1.0),
        ('{"name": "a", "n": 0}', 0.0),
        ('{"name": "a", "other": 1}', 0.0),
        ('The call is\n```json\n{"name": "a"}\n```\n', 1.0),
        ('```\n{}\n```\nor\n```json\n{"name": "a"}\n```', 1.0),
        ('{"name": "a"} and more', 0.0),
        ('{"name": "a", "n": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_the_response_is_json_that_satisfies_the_schema(response, reward):
    assert json_schema(response, schema=SCHEMA) == reward


@pytest.mark.parametrize(
    ("schema", "message"),
    [({"type": "objct"}, "is no JSON schema: 'objct' is not valid"), ("{", "is no JSON schema: Expecting property")],
)
def test_a_schema_that_is_none_is_refused(schema, message):
    with pytest.raises(RewardError, match=message):
        json_schema("{}", schema=schema)
    with pytest.raises(RewardError, match="is no JSON schema"):
        json_schema("{}", schema=schema)


def test_mathematics_without_its_package_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "async_rl.rollout.rewards.math", raising=False)
    with pytest.raises(RewardError, match="RewardError: this reward needs the package math-verify; install"):
        load_reward(NamedReward("reward.function", "async_rl.rollout.rewards.math:math_verify"))


@pytest.fixture
def math_verify():
    pytest.importorskip("math_verify")
    return importlib.import_module("async_rl.rollout.rewards.math").math_verify


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("1/2", "So it is \\boxed{0.5}.", 1.0),
        ("\\frac{1}{2}", "The answer is 0.5", 1.0),
        ("$x^2+1$", "$1+x^2$", 1.0),
        ("1,000", "1000", 1.0),
        ("72", "48 + 24 = 72\n#### 72", 1.0),
        ("72", "71", 0.0),
        ("72", "I do not know", 0.0),
        (72, "72", 1.0),
    ],
)
def test_answers_are_compared_as_mathematics(math_verify, answer, response, reward):
    assert math_verify(prompt(answer=answer), response, answer=answer) == reward
    model = {"style": "rule", "ground_truth": str(answer)}
    assert math_verify(prompt(reward_model=model), response) == reward


def test_a_row_without_an_answer_or_with_one_that_cannot_be_read_is_named(math_verify):
    with pytest.raises(RewardError, match=r"a field 'answer', or reward_model\.ground_truth, .* row 17 has level$"):
        math_verify(prompt(level=3), "1")
    with pytest.raises(RewardError, match=r"row 17 has the answer '', which math-verify cannot read"):
        math_verify(prompt(), "1", answer="")


@pytest.mark.usefixtures("math_verify")
async def test_mathematics_runs_in_worker_processes_whatever_reward_slow_says():
    runner = RewardRunner(RewardSection(function="async_rl.rollout.rewards.math:math_verify", workers=1))
    try:
        assert await runner.score(prompt(answer="1/2"), FinishedResponse("\\boxed{0.5}")) == Score(1.0)
    finally:
        runner.close()
