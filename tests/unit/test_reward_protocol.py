"""What a reward is called with, by the names in its signature, and what it may return."""

import math

import numpy as np
import pytest

from async_rl.errors import RewardError
from async_rl.metrics.publish import step_row
from async_rl.rollout.rewards.score import MAX_PARTS, FinishedResponse, Score, score_of
from async_rl.rollout.rewards.signature import Signature
from async_rl.types import Prompt
from tests.support.scripted_replica import Digits, ListQueue, scripted, worker
from tests.support.step_records import step_record

PROMPT = Prompt("0-17", 17, "hdbca>", np.array([1, 2], np.int32), {"answer": "abcdh", "level": 3, "p": "a column"})
RESPONSE = FinishedResponse("ab, no: abcdh", "length", ("ab", ", no: ", "abcdh"), np.array([7, 8], np.int32), 2)
ALL = {
    "prompt": PROMPT,
    "response": "ab, no: abcdh",
    "turns": ("ab", ", no: ", "abcdh"),
    "finish_reason": "length",
    "completion_ids": RESPONSE.completion_ids,
    "fields": PROMPT.fields,
}


def called(function, prompt=PROMPT):
    positional, named = Signature.of(function).arguments(prompt, RESPONSE)
    return function(*positional, **named)


def test_a_reward_is_called_with_whatever_it_names():
    def everything(prompt, response, turns, finish_reason, completion_ids, fields):
        return locals()

    assert called(everything) == ALL
    assert called(lambda *, answer, response: (answer, response)) == ("abcdh", RESPONSE.text)
    assert called(lambda response, answer, level: (response, answer, level)) == (RESPONSE.text, "abcdh", 3)
    assert called(lambda finish_reason: finish_reason) == "length"
    assert called(lambda completion_ids, answer: completion_ids.tolist()) == [7, 8]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompt, response: (prompt, response),
        lambda a, b: (a, b),
        lambda prompt, answer: (prompt, answer),  # The response, though the row has a field of this name.
        lambda a, b, /: (a, b),
        lambda *arguments: arguments,
        lambda a, *rest: (a, *rest),
        lambda a, b=None: (a, b),
        lambda a, b, **rest: (a, b),
        lambda a, b, unknown=None: (a, b),
    ],
)
def test_a_function_of_two_arguments_gets_prompt_and_response_whatever_it_calls_them(function):
    assert called(function) == (PROMPT, RESPONSE.text)


def test_what_has_a_default_value_gets_it_where_the_row_has_no_such_column():
    def reward(prompt, response, level=1, hint="none", finish_reason=None):
        return level, hint, finish_reason

    assert called(reward) == (3, "none", "length")
    assert called(lambda response, hint="none": hint) == "none"


def test_a_column_that_the_row_lacks_is_named_with_those_it_has():
    with pytest.raises(RewardError, match=r"its argument 'solution' .* row 17 has answer, level, p$"):
        called(lambda response, solution: 1.0)
    bare = Prompt("0-1", 1, "a", np.array([1], np.int32))
    with pytest.raises(RewardError, match=r"its argument 'answer' .* row 1 has no fields"):
        called(lambda response, answer: 1.0, bare)


def test_a_first_argument_that_may_mean_the_prompt_or_a_column_is_refused():
    with pytest.raises(RewardError, match=r"first argument 'p' is called as a field of dataset row 17, but would get"):
        called(lambda p, response: 1.0)
    assert called(lambda *, p, response: p) == "a column"


@pytest.mark.parametrize("function", [lambda prompt: 1.0, lambda answer, level, extra: 1.0, lambda response, /: 1.0])
def test_a_function_that_does_not_see_the_response_is_refused(function):
    with pytest.raises(TypeError, match=r"^f\(prompt, response\), nor by name .*; its signature is f\("):
        Signature.of(function)


@pytest.mark.parametrize("key", ["score", "reward"])
def test_a_mapping_is_a_reward_and_its_parts(key):
    value = {key: np.float32(0.5), "acc": True, "steps": np.int64(3), "pred": "42", "none": None, "list": [1.0]}
    score = score_of(value)
    assert score == Score(0.5, {"acc": 1.0, "steps": 3.0})
    assert {type(part) for part in score.parts.values()} == {float}
    assert score_of({key: None, "acc": 1.0}) is None
    assert score_of({key: 1}) == Score(1.0) == score_of(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"acc": 1.0, "format": 0.5}, "neither 'score' nor 'reward', .*; its keys are 'acc', 'format'$"),
        ({}, "neither 'score' nor 'reward', .*; its keys are none$"),
        ({"score": 1.0, "reward": 1.0}, "both 'score' and 'reward'"),
        ({"score": "1.0"}, r"returned '1.0' of type str; expected .*, under the key 'score'$"),
        ({"score": math.inf}, "returned inf; expected one finite real number.*, under the key 'score'$"),
        ({"score": 1.0, "acc": math.nan}, "returned nan; expected .*, under the key 'acc'$"),
        ({"score": 1.0, 3: 0.5}, "a mapping with the key 3; expected names of at most 60 characters"),
        ({"score": 1.0, "a" * 61: 0.5}, "expected names of at most 60 characters"),
        ({"score": 1.0, "a\nb": 0.5}, "expected names"),
        ({"score": 1.0, "": 0.5}, "expected names"),
        ({"score": 1.0, **{f"part{n}": 0.0 for n in range(MAX_PARTS)}}, "of 33 keys, and at most 32 can be metrics: "),
    ],
)
def test_a_mapping_that_has_no_one_reward_is_refused_by_its_keys(value, message):
    with pytest.raises(ValueError, match=message):
        score_of(value)


async def test_named_parts_reach_the_group_of_a_replica_and_its_prepared_response_the_reward():
    class Asks(Digits):
        needs = frozenset({"turns", "completion_ids"})
        seen = ()

        async def score(self, prompt, response, source):
            self.seen += (response,)
            return Score(1.0, {"tokens": float(response.tokens)})

    queue, asks = ListQueue(1), Asks()
    subject, _ = worker(scripted(length=5), queue, digits=asks)
    await subject.run()
    (group,) = queue.groups
    assert [(r.reward, r.reward_parts) for r in group.rollouts] == [(1.0, {"tokens": 5.0})] * 2
    ids = group.trajectories[0].response_ids
    for response in asks.seen:
        assert (response.turns, response.finish_reason) == ((response.text,), "stop")
        assert response.completion_ids.tolist() == ids.tolist()
        assert not np.shares_memory(response.completion_ids, ids), "a reward must not change what is trained"


def test_means_of_parts_and_truncated_responses_are_columns():
    row = step_row(step_record(reward_parts={"format": 0.25}, truncated=3))
    assert row["reward_part_mean"] == {"format": 0.25}
    assert row["truncated_responses"] == 3
