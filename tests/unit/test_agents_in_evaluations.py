"""Evaluations whose answers are rollouts of an agent, with a scripted engine: in a run, at its standstills, alone."""

import asyncio
import dataclasses
import json
import sys

import numpy as np
import pytest

from async_rl.config.inputs import Terms
from async_rl.config.loading import validate
from async_rl.driver import eval_command
from async_rl.errors import AgentFailure, ConfigError, EngineError, RewardError
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.environments.interface import Step
from async_rl.rollout.evaluation import GREEDY, EvalProblem
from async_rl.rollout.outcome import Outcome
from async_rl.types import Prompt
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import Digits, ListQueue, sampled, scripted, worker

PROMPTS = [Prompt(f"eval-{n}", n, "abc", np.array([5, 6, 7], dtype=np.int32)) for n in range(3)]
SET = Terms("aime", 40, agent="rollout.agent")
SAMPLING = Sampling(0.6, 0.9, top_k=20)
SEEN = {}  # what agents were called with, by rollout


class Letters(Digits):
    """Its tokens are letters: 1 is b."""

    def __len__(self):
        return 10_000

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + int(token) % 26) for token in ids)

    def encode(self, text, **_):
        return [ord(c) - ord("a") for c in text]


class Noting(ScriptedEngine):
    """Notes how it was asked to sample, by rollout."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.samplings = {}

    async def generate(self, request_id, token_ids, sampling, max_tokens, first_row=0):
        rollout = request_id.rpartition("/")[0]
        if rollout.startswith("eval"):
            rollout = rollout.partition(".")[0]
        self.samplings.setdefault(rollout, []).append(sampling)
        return await super().generate(request_id, token_ids, sampling, max_tokens, first_row)


def replica(engine, name, queue=None, **agent):
    rollout = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40}
    named = {} if {"command", "environment"} & agent.keys() else {"function": f"{__name__}:{name}"}
    rollout["agent"] = {**named, **agent}
    subject, _ = worker(engine, queue or ListQueue(0), digits=Letters(), rollout=rollout)
    return subject


def problem(number, k=1, terms=SET, sampling=GREEDY, **more):
    return EvalProblem(terms, PROMPTS[number], k, sampling, **more)


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


async def forks(prompt, policy, context):
    """Answer, then ask on from there twice at one time: three turns in two or three trajectories."""
    SEEN[context.rollout_id] = context
    first = await policy.complete(prompt.token_ids, max_tokens=4)
    said = [*prompt.token_ids, *first.token_ids]
    await asyncio.gather(*(policy.complete([*said, 90 + i], max_tokens=3) for i in range(2)))
    return {"reward": float(prompt.row), "turns": 3}


async def test_answers_are_rollouts_sampled_as_their_set_says_and_training_goes_on_beside_them():
    engine, queue = scripted(kind=Noting), ListQueue(2)
    subject = replica(engine, "forks", queue)
    training = asyncio.create_task(subject.run())
    result = await subject.evaluate([problem(1, 2, sampling=SAMPLING, shown=True), problem(2, source="2024")])
    await training
    first, second = result.answers
    assert (first.scored.rewards, second.scored.rewards) == ((1.0, 1.0), (2.0,))
    assert (first.scored.tokens, second.scored.tokens) == ((10, 10), (10,)), "of all trajectories"
    assert (second.scored.source, second.shown) == ("2024", None)
    assert [len(first.shown.response_ids), *map(len, first.shown.branches)] == [4, 3, 3]
    evaluated = {name: context for name, context in SEEN.items() if context.evaluation is not None}
    assert sorted(evaluated) == ["eval/eval-1/0", "eval/eval-1/1", "eval/eval-2/0"]
    assert {context.evaluation for context in evaluated.values()} == {"aime"}
    assert len({context.seed for context in SEEN.values()}) == len(SEEN) == 3 + 4
    by_rollout = {name: set(used) for name, used in engine.samplings.items()}
    assert by_rollout.pop("eval/eval-1/0") == by_rollout.pop("eval/eval-1/1") == {SAMPLING}
    assert {sampling.greedy for sampling in by_rollout.pop("eval/eval-2/0")} == {True}
    assert {sampling.temperature for used in by_rollout.values() for sampling in used} == {1.0}
    assert len(queue.groups) == 2
    assert sum(subject._worker.agents["rollout.agent"].ways.values()) == 4 * 3, "turns in training alone"
    trained = sum(int(t.sampled.sum()) for group in queue.groups for t in group.trajectories)
    assert subject.stats().generated_tokens == trained


async def until_the_limit(prompt, policy, context):
    SEEN[context.rollout_id] = reply = await policy.complete(prompt.token_ids)
    return Outcome(1.0, end="abandoned" if prompt.row else None) if reply.finish_reason == "length" else 0.0


async def test_a_rollout_ends_where_its_set_says_and_counts_as_cut_off():
    engine = scripted(kind=Noting)
    short = dataclasses.replace(SET, max_response_tokens=5)
    asked = [problem(0, 2, short), problem(1, terms=short), problem(2)]
    answers = (await replica(engine, "until_the_limit").evaluate(asked)).answers
    assert [answer.scored.rewards for answer in answers] == [(1.0, 1.0), (1.0,), (0.0,)]
    assert [answer.scored.truncated for answer in answers] == [2, 0, 0], "the agent's own word for it counts"
    assert [answer.scored.tokens for answer in answers] == [(5, 5), (5,), (12,)]


async def stops_itself(prompt, policy, context):
    return float(len((await policy.complete(prompt.token_ids, stop=["d"])).token_ids))


async def test_stop_strings_of_the_set_and_of_the_agent_end_turns():
    asked = [problem(0), problem(1, terms=dataclasses.replace(SET, stop=("c",)))]
    answers = (await replica(scripted(), "stops_itself").evaluate(asked)).answers
    assert [answer.scored.rewards for answer in answers] == [(3.0,), (2.0,)]


async def asks_nothing(prompt, policy, context):
    return 0.25


async def test_an_agent_that_asks_nothing_has_a_result():
    (answer,) = (await replica(scripted(), "asks_nothing").evaluate([problem(0, shown=True)])).answers
    assert (answer.scored.rewards, answer.scored.tokens, len(answer.shown.response_ids)) == ((0.25,), (0,), 0)


async def fails_on_one(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    if prompt.row == 1:
        raise ValueError("no such tool")
    return None if prompt.row == 2 else 1.0


async def test_a_rollout_that_fails_or_has_no_reward_costs_its_problem_or_ends_the_run():
    asked = [problem(number, 2) for number in range(3)]
    answers = (await replica(scripted(), "fails_on_one", on_error="skip").evaluate(asked)).answers
    assert [answer.scored and answer.scored.rewards for answer in answers] == [(1.0, 1.0), None, None]
    with pytest.raises(AgentFailure, match=r"prompt eval-1 \(dataset row 1\): raised ValueError: no such tool"):
        await replica(scripted(), "fails_on_one").evaluate(asked)
    with pytest.raises(RewardError, match="each of 2 evaluation problems failed"):
        await replica(scripted(), "fails_on_one", on_error="skip").evaluate(asked[1:])


async def catches_all(prompt, policy, context):
    try:
        await policy.complete(prompt.token_ids)
    except Exception:  # noqa: BLE001
        return 0.0
    return 1.0


async def test_an_evaluation_that_is_cut_is_no_result_whatever_the_agent_makes_of_it():
    engine = scripted()
    evaluation = asyncio.create_task(replica(engine, "catches_all").evaluate([problem(0), problem(1)]))
    await sampled(engine, 3)
    await engine.pause("abort")
    await engine.resume()
    with pytest.raises(EngineError, match="an evaluation was aborted"):
        await evaluation


async def hangs(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    await asyncio.sleep(3600 * prompt.row)
    return 1.0


async def test_a_paused_replica_evaluates_and_its_clock_runs():
    subject = replica(scripted(), "hangs", on_error="skip", timeout_s=0.3)
    await subject.pause()
    await subject.wake()
    async with asyncio.timeout(60):
        answers = (await subject.evaluate([problem(0), problem(1)])).answers
    assert [answer.scored and answer.scored.rewards for answer in answers] == [(1.0,), None]


class Hangs:
    def setup(self, task, context):
        self.row = task.row

    async def step(self, message):
        await asyncio.sleep(3600 * self.row)
        return Step("", reward=1.0, done=True)


async def test_a_paused_replica_evaluates_environments_within_their_time():
    subject = replica(
        scripted(), "", environment=f"{__name__}:Hangs", inline=True, step_s=0.3, close_s=0.3, on_error="skip"
    )
    await subject.pause()
    await subject.wake()
    async with asyncio.timeout(60):
        answers = (await subject.evaluate([problem(0), problem(1)])).answers
    assert [answer.scored and answer.scored.rewards for answer in answers] == [(1.0,), None]
    await subject.shutdown()


PROGRAM = """
import json, os, urllib.request, sys
row = json.load(sys.stdin)
body = json.dumps({"prompt": [5, 6, 7], "temperature": 0.1, "max_tokens": 4, "return_token_ids": True}).encode()
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/completions", body)
answer = json.load(urllib.request.urlopen(request))
told = os.environ["ASYNC_RL_EVALUATION"], os.environ["ASYNC_RL_ROLLOUT_ID"]
assert told == ("aime", "eval/eval-0/0"), told
print(len(answer["choices"][0]["token_ids"]))
"""


async def test_a_program_is_evaluated_over_http_and_samples_as_the_set_says():
    engine = scripted(kind=Noting)
    subject = replica(engine, "", command=[sys.executable, "-c", PROGRAM])
    async with asyncio.timeout(60):
        (answer,) = (await subject.evaluate([problem(0, sampling=SAMPLING)])).answers
    assert answer.scored.rewards == (4.0,)
    assert engine.samplings == {"eval/eval-0/0": [SAMPLING]}
    await subject.shutdown()


class Encoder:
    tokenizer = Letters()
    prints_date = False

    def text(self, text):
        return list(text.encode())


def test_the_command_evaluates_an_agent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "load_engine", lambda name: lambda config, *_, **__: scripted(kind=Noting))
    monkeypatch.setattr(eval_command.reading, "encoder", lambda config: Encoder())
    monkeypatch.setattr(eval_command.logs, "configure", lambda *_, **__: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    tree = {
        "name": "demo",
        "runs": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": "train.jsonl"},
        "eval": {"sets": {"mine": {"path": str(tmp_path / "rows.jsonl"), "k": 2}}},
        "rollout": {"max_response_tokens": 40, "agent": {"function": f"{__name__}:forks"}},
    }
    assert eval_command.run(validate(tree), None) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]["mine"]
    assert (result["problems"], result["k"], result["avg"]["mean"], result["pass"]["2"]["mean"]) == (2, 2, 1.5, 1.0)
    assert result["response_tokens_mean"] == 10
    samples = (tmp_path / "runs" / "demo-eval" / "eval_samples.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["branches"]) for line in samples] == [2, 2]


def test_an_environment_of_a_set_is_refused_beside_an_agent():
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "rollout": {"agent": {"function": "a:b"}}}
    validate({**tree, "eval": {"sets": {"mine": {"path": "e.jsonl"}}}})
    with pytest.raises(ConfigError, match=r"and eval\.sets\.mine\.environment is c:d, but an agent"):
        validate({**tree, "eval": {"sets": {"mine": {"path": "e.jsonl", "environment": "c:d"}}}})
