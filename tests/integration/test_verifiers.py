"""A real environment of the library verifiers, under its own interpreter, at the real gateway."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from async_rl.rollout import chat
from async_rl.rollout.environments.instance import Failed
from tests.support.agent_sessions import CHAT
from tests.support.gateway_parts import Answers
from tests.support.gateway_parts import served as behind_a_gateway
from tests.support.needs import NEEDS_VERIFIERS, VERIFIERS_PYTHON
from tests.support.played import environments, play
from tests.support.scripted_replica import ListQueue
from tests.support.served_agents import TURN, engine, run_with_pushes, served

pytestmark = [NEEDS_VERIFIERS, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "tests" / "support" / "libraries"
NAME = "async_rl.rollout.environments.verifiers:Verifiers"
ENDS = ("policy_error", "timed_out", "no_room")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Give hosts a log, and the folder of the environment's package."""
    path = tmp_path_factory.mktemp("log") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENVIRONMENTS_LOG", str(path))
        patch.setenv("PYTHONPATH", str(LIBRARIES))
        yield path


@pytest.fixture(scope="module")
async def guess(log):
    arguments = {"environment": "guess-env"}
    async with environments(NAME, python=str(VERIFIERS_PYTHON), arguments=arguments) as subject:
        await subject.start()
        yield subject


def row(**info):
    """Return a row as ``data.train`` has it after ``prepare``."""
    prompt = [{"role": "system", "content": "Guess."}, {"role": "user", "content": "q2"}]
    return {"prompt": prompt, "question": "q2", "answer": "42", "info": {"level": 2, **info}, "example_id": 2}


def ends(played):
    return [name for name in ENDS if played.metrics[name]]


async def test_an_environment_is_played_as_the_library_plays_it(guess):
    async with behind_a_gateway() as behind:
        played = await play(guess, behind.policy, row(turns=3))
        assert (played.reward, played.truncated, ends(played)) == (5.25, False, [])
        assert {name: played.metrics[name] for name in ("length", "known", "num_turns")} == {
            "length": 5.0,
            "known": 1.0,
            "num_turns": 3.0,
        }
        assert behind.session.ways == {"first": 1, "extended": 2}  # What was sampled is never tokenized again.
        assert len(behind.session.branches) == 1


async def test_rollouts_of_one_host_run_at_one_time(guess):
    async with behind_a_gateway() as one, behind_a_gateway() as other:
        played = await asyncio.gather(
            *(play(guess, each.policy, row(turns=n)) for n, each in ((1, one), (2, other))),
        )
    assert [each.reward for each in played] == [1.25, 3.25]


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("sandbox", r"ended with SandboxError\('the sandbox is gone'\)"),
        ("bug", "its rollout raised KeyError: 'board'"),
    ],
)
async def test_what_the_environment_does_wrong_fails_its_rollout(guess, log, how, match):
    before = log.read_text().count("cleanup") if log.exists() else 0
    async with behind_a_gateway() as behind:
        with pytest.raises(Failed, match=match):
            await play(guess, behind.policy, row(how=how))
    assert log.read_text().count("cleanup") == before + 1


@pytest.mark.parametrize(
    ("info", "words", "reward"),
    [({"how": "tool"}, 2, 1.25), ({}, 0, 0.25)],
    ids=["a tool that is none", "nothing said"],
)
async def test_what_the_policy_does_wrong_is_scored_and_counted(guess, info, words, reward):
    async with behind_a_gateway(Answers(words)) as behind:
        played = await play(guess, behind.policy, row(**info))
    assert (played.reward, played.truncated, ends(played)) == (reward, False, ["policy_error"])


@pytest.mark.parametrize("limits", [{"turns": 2}, {"context_tokens": 40}], ids=["turns", "context"])
async def test_a_limit_of_the_run_ends_a_rollout_and_has_it_scored(guess, limits):
    async with behind_a_gateway(**limits) as behind:
        played = await play(guess, behind.policy, row(turns=50))
    assert (played.truncated, ends(played)) == (True, ["no_room"])
    assert played.reward == played.metrics["length"] + 0.25
    assert played.metrics["length"] >= 3


async def test_a_rollout_that_is_cancelled_is_cleaned_up(guess, log):
    async with behind_a_gateway() as behind:
        running = asyncio.create_task(play(guess, behind.policy, row(how="hangs")))
        async with asyncio.timeout(60):
            while not log.exists() or "hangs" not in log.read_text():
                await asyncio.sleep(0.02)
        before = log.read_text().count("cleanup")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(60):
            while log.read_text().count("cleanup") == before:
                await asyncio.sleep(0.02)
    assert not guess._hosts.lost


async def test_its_dataset_becomes_rows(guess, tmp_path):
    assert await guess.write_rows("train", tmp_path / "train.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[2] == row(turns=3)


async def test_a_function_of_ones_own_makes_an_environment_and_its_time_limit_truncates(log):
    arguments = {"environment": "guess_env:load_environment", "args": {"timeout_seconds": 1.0}}
    async with environments(NAME, python=str(VERIFIERS_PYTHON), arguments=arguments) as subject:
        async with behind_a_gateway() as behind:
            played = await play(subject, behind.policy, row(how="hangs"))
        assert (played.reward, played.truncated, ends(played)) == (1.25, True, ["timed_out"])


LOADED = """
import signal
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.verifiers import Verifiers

def tried(*arguments):
    try:
        Verifiers.prepare(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

before = signal.getsignal(signal.SIGTERM)
print(tried("guess-env"))
print(signal.getsignal(signal.SIGTERM) is before)
print(tried("guess-env", {"rewards": "group"}))
print(tried("guess_env:no_environment"))
print(tried("no-such-env"))
try:
    list(Verifiers.rows("eval", "guess-env"))
except Failed as error:
    print(error)
"""


async def test_what_cannot_be_loaded_is_named(log):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{LIBRARIES}"}
    found = subprocess.run(
        [VERIFIERS_PYTHON, "-c", LOADED], env=environment, capture_output=True, text=True, check=True
    )
    fine, kept, group, other, absent, no_eval = found.stdout.splitlines()
    assert (fine, kept) == ("None", "True")
    assert group.startswith("Failed: guess-env has reward functions that compare the rollouts of a group")
    assert other == "Failed: guess_env:no_environment returned a int; expected an Environment of verifiers"
    assert "Could not import 'no-such-env' environment" in absent
    assert no_eval == "guess-env has no eval_dataset; set data.eval"


async def test_a_worker_trains_on_it_while_weights_are_pushed(log, monkeypatch):
    monkeypatch.setattr(chat, "chat_turns", lambda config: CHAT)
    subject, queue = engine(), ListQueue(2, row(turns=3))
    made = served(
        subject, queue, environment=NAME, python=str(VERIFIERS_PYTHON), arguments={"environment": "guess-env"}
    )
    assert await run_with_pushes(subject, made, 5) >= 4
    assert len(queue.groups) == 2
    for rollout in (rollout for group in queue.groups for rollout in group.rollouts):
        assert (rollout.reward, rollout.end) == (5.25, "done")
        assert rollout.metrics["num_turns"] == 3.0
        (trajectory,) = rollout.trajectories
        assert int(trajectory.sampled.sum()) == 3 * TURN
    assert any(t.is_partial for group in queue.groups for r in group.rollouts for t in r.trajectories)
