"""Real environments of the library verifiers, each version under its own interpreter, at the real gateway."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
import pytest_asyncio

from async_rl.rollout import chat
from async_rl.rollout.environments.instance import Failed
from tests.support.agent_sessions import CHAT
from tests.support.gateway_parts import Answers
from tests.support.gateway_parts import served as behind_a_gateway
from tests.support.guesses import EACH, LIBRARIES, V0, V1
from tests.support.needs import NEEDS_VERIFIERS, VERIFIERS_PYTHON
from tests.support.played import environments, play
from tests.support.scripted_replica import ListQueue
from tests.support.served_agents import TURN, engine, run_with_pushes, served

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[2]
ENDS = ("policy_error", "timed_out", "no_room")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Give hosts a log, and the folder of the environments' packages."""
    path = tmp_path_factory.mktemp("log") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENVIRONMENTS_LOG", str(path))
        patch.setenv("PYTHONPATH", str(LIBRARIES))
        yield path


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=EACH)
async def guess(log, request):
    agent = request.param.agent()
    async with environments(agent.pop("environment"), **agent) as subject:
        subject.row, subject.library = request.param.row, request.param
        await subject.start()
        yield subject


class HeldUp(Answers):
    """Gives no second answer."""

    async def __call__(self, partial, request_id, stop=()):
        if len(self.calls) >= 2 and not partial.interrupted:
            self.hold = asyncio.Event()
        return await super().__call__(partial, request_id, stop)


def ends(played):
    return [name for name in ENDS if played.metrics.get(name)]


async def test_an_environment_is_played_as_the_library_plays_it(guess):
    async with behind_a_gateway() as behind:
        played = await play(guess, behind.policy, guess.row(turns=3))
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
            *(play(guess, each.policy, guess.row(turns=n)) for n, each in ((1, one), (2, other))),
        )
    assert [each.reward for each in played] == [1.25, 3.25]


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("sandbox", {V0: r"ended with SandboxError\('the sandbox is gone'\)", V1: "SandboxError: the sandbox is gone"}),
        (
            "bug",
            {V0: "its rollout raised KeyError: 'board'", V1: r"with EnvError: GuessEnv.run\(\): KeyError: 'board'"},
        ),
    ],
)
async def test_what_the_environment_does_wrong_fails_its_rollout(guess, log, how, match):
    before = log.read_text().count("cleanup") if log.exists() else 0
    async with behind_a_gateway() as behind:
        with pytest.raises(Failed, match=match[guess.library]):
            await play(guess, behind.policy, guess.row(how=how))
    assert log.read_text().count("cleanup") == before + 1


@pytest.mark.parametrize("limits", [{"turns": 2}, {"context_tokens": 40}], ids=["turns", "context"])
async def test_a_limit_of_the_run_ends_a_rollout_and_has_it_scored(guess, limits):
    async with behind_a_gateway(**limits) as behind:
        played = await play(guess, behind.policy, guess.row(turns=50))
    assert (played.truncated, ends(played)) == (True, ["no_room"])
    assert played.reward == played.metrics["length"] + 0.25
    assert played.metrics["length"] >= 3


async def test_a_rollout_that_is_cancelled_is_cleaned_up(guess, log):
    async with behind_a_gateway() as behind:
        hung = log.read_text().count("hangs") if log.exists() else 0
        running = asyncio.create_task(play(guess, behind.policy, guess.row(how="hangs")))
        async with asyncio.timeout(60):
            while not log.exists() or log.read_text().count("hangs") == hung:
                await asyncio.sleep(0.02)
        before = log.read_text().count("cleanup")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(60):
            while log.read_text().count("cleanup") == before:
                await asyncio.sleep(0.02)
    assert not guess._hosts.lost


async def test_its_dataset_becomes_rows_which_are_played(guess, tmp_path):
    assert await guess.write_rows("train", tmp_path / "train.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    wanted = guess.row(turns=3)
    assert set(rows[2]) == set(wanted)
    assert rows[2]["prompt"] == wanted["prompt"]
    async with behind_a_gateway() as behind:
        assert (await play(guess, behind.policy, rows[2])).reward == 5.25


@pytest.mark.parametrize(
    ("library", "args"),
    [
        pytest.param(V0, {"timeout_seconds": 1.0}, id="0.3", marks=EACH[0].marks),
        pytest.param(V1, {"timeout": {"rollout": 5.0}}, id="0.4", marks=EACH[1].marks),
    ],
)
async def test_a_function_of_ones_own_makes_an_environment_and_its_time_limit_truncates(log, library, args):
    agent = library.agent(environment=library.made_by, args=args)
    async with environments(agent.pop("environment"), **agent) as subject, behind_a_gateway(HeldUp()) as behind:
        async with asyncio.timeout(60):
            played = await play(subject, behind.policy, library.row())
        assert (played.reward, played.truncated, ends(played)) == (1.25, True, ["timed_out"])


@pytest.mark.parametrize("library", EACH)
async def test_a_worker_trains_on_it_while_weights_are_pushed(log, monkeypatch, library):
    monkeypatch.setattr(chat, "chat_turns", lambda config: CHAT)
    subject, queue = engine(), ListQueue(2, library.row(turns=3))
    made = served(subject, queue, **library.agent())
    assert await run_with_pushes(subject, made, 5) >= 4
    assert len(queue.groups) == 2
    for rollout in (rollout for group in queue.groups for rollout in group.rollouts):
        assert (rollout.reward, rollout.end) == (5.25, "done")
        assert rollout.metrics["num_turns"] == 3.0
        (trajectory,) = rollout.trajectories
        assert int(trajectory.sampled.sum()) == 3 * TURN
    assert any(t.is_partial for group in queue.groups for r in group.rollouts for t in r.trajectories)


# -- 0.3 alone; test_verifiers_v1.py has what is 0.4's --


@pytest.mark.parametrize("guess", EACH[:1], indirect=True)
@pytest.mark.parametrize(
    ("info", "words", "reward"),
    [({"how": "tool"}, 2, 1.25), ({}, 0, 0.25)],
    ids=["a tool that is none", "nothing said"],
)
async def test_what_the_policy_does_wrong_is_scored_and_counted(guess, info, words, reward):
    async with behind_a_gateway(Answers(words)) as behind:
        played = await play(guess, behind.policy, guess.row(**info))
    assert (played.reward, played.truncated, ends(played)) == (reward, False, ["policy_error"])


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
print(tried("guess-env", None, {"train": {}}))
try:
    list(Verifiers.rows("eval", "guess-env"))
except Failed as error:
    print(error)
"""


@NEEDS_VERIFIERS
async def test_what_cannot_be_loaded_is_named(log):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{LIBRARIES}"}
    found = subprocess.run(
        [VERIFIERS_PYTHON, "-c", LOADED], env=environment, capture_output=True, text=True, check=True
    )
    fine, kept, group, other, absent, select, no_eval = found.stdout.splitlines()
    assert (fine, kept) == ("None", "True")
    assert group.startswith("Failed: guess-env has reward functions that compare the rollouts of a group")
    assert other == "Failed: guess_env:no_environment returned a int; expected an Environment of verifiers"
    assert "Could not import 'no-such-env' environment" in absent
    assert select == "Failed: arguments.select is for tasksets, which verifiers has from 0.4 on; leave it out"
    assert no_eval == "guess-env has no eval_dataset; set data.eval"
