"""A real server of OpenEnv on loopback, and what it costs when it is slow, wrong or killed.

What a server may answer that OpenEnv's does not is in tests/unit/test_openenv.py.
"""

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from async_rl.rollout import chat
from async_rl.rollout.environments.instance import Failed
from tests.support.agent_sessions import CHAT
from tests.support.needs import NEEDS_VERIFIERS, VERIFIERS_PYTHON
from tests.support.played import Says, call, calls, environments, play, summed
from tests.support.scripted_replica import ListQueue
from tests.support.served_agents import TURN, engine, run_with_pushes, served

pytestmark = NEEDS_VERIFIERS

NAME = "async_rl.rollout.environments.openenv:OpenEnv"
SERVER = Path(__file__).resolve().parents[1] / "support" / "libraries" / "openenv_server.py"


@contextlib.contextmanager
def serving():
    """Yield a server's process, and the addresses of its environments."""
    process = subprocess.Popen([VERIFIERS_PYTHON, SERVER], stdout=subprocess.PIPE, text=True)
    try:
        ports = json.loads(process.stdout.readline())
        yield process, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def urls():
    with serving() as (_, found):
        yield found


def words(urls, **settings):
    arguments = {"url": urls["words"], "text_field": "word", "observation_field": "text"}
    return environments(NAME, inline=True, arguments=arguments, **settings)


async def test_a_game_is_played_in_a_session_of_its_own(urls):
    policy = Says("crane", "slate", "ox")
    async with words(urls) as subject:
        await subject.start()
        played = await play(subject, policy, {"seed": 9, "reset": {"level": 2}})
    assert policy.asked[0] == [{"role": "user", "content": "abc\n\nseed 9, level 2, 0-1.0/0"}]
    assert policy.heard == [("user", "saw crane"), ("user", "saw slate")]
    assert summed(played) == {"reward": 1.5, "letters": 2.0, "step_count": 3.0, "action_errors": 0.0}
    assert played.turn_rewards == {0: 0.5, 1: 0.5, 2: 0.5}


async def test_actions_as_json_that_do_not_fit_are_told_to_the_policy(urls):
    policy = Says('{"word": 5}', '{"letter": "a"}', *['{"word": "a"}'] * 3)
    async with environments(NAME, inline=True, arguments={"url": urls["words"]}) as subject:
        played = await play(subject, policy)
    told = [said for _, said in policy.heard]
    assert told[0] == "Error: word: Input should be a valid string"
    assert "word: Field required" in told[1]
    assert "letter: Extra inputs are not permitted" in told[1]
    assert told[2:] == ["saw a", "saw a"]
    assert summed(played)["action_errors"] == 2.0
    assert played.reward is None or summed(played)["reward"] == 1.5


async def test_tools_of_the_server_are_called(urls):
    policy = Says(
        calls(*call("add", {"a": 1, "b": 2}, "x")["tool_calls"], *call("fail", {}, "y")["tool_calls"]),
        call("add", {"a": "one", "b": 2}),
        call("add", {"a": 3, "b": 4}),
        "seven",
    )
    async with environments(NAME, inline=True, arguments={"url": urls["sums"], "tools": True}) as subject:
        played = await play(subject, policy)
    told = [said for _, said in policy.heard]
    assert told[0] == "3"
    assert told[1].startswith("Error: ")
    assert "out of order" in told[1]
    assert told[2].startswith("Error: the argument a of add is 'one'")
    assert told[3] == "7"
    assert {tool["function"]["name"] for tool in policy.tools} == {"add", "fail"}
    assert summed(played) == {"reward": 1.5, "tool_errors": 1.0}


async def test_more_rollouts_than_sessions_wait_for_one(urls):
    async with words(urls) as subject:
        played = await asyncio.gather(*(play(subject, Says(), name=f"0-{n}") for n in range(5)))
    assert [summed(each)["reward"] for each in played] == [1.5] * 5


@pytest.mark.parametrize(
    ("said", "field", "match"),
    [
        ("bug", "word", r"failed in its step: no such letter \(EXECUTION_ERROR\)"),
        ("slow", "word", r"its step has not ended after 2 s"),
        ("crane", "letter", r"is not a text in 'letter' \(.*\); set rollout\.agent\.arguments\.text_field"),
    ],
)
async def test_what_goes_wrong_costs_one_rollout(urls, said, field, match):
    arguments = {"url": urls["words"], "text_field": field}
    async with environments(NAME, inline=True, arguments=arguments, step_s=2.0) as subject:
        beside = asyncio.create_task(play(subject, Says(), name="0-2")) if field == "word" else None
        with pytest.raises(Failed, match=match):
            await play(subject, Says(said))
        if beside is not None:
            assert summed(await beside)["reward"] == 1.5


class Waits(Says):
    """Says nothing after its first turn until ``go``."""

    def __init__(self):
        super().__init__()
        self.go, self.waits = asyncio.Event(), asyncio.Event()

    async def chat(self, messages, tools=None):
        if self.asked:
            self.waits.set()
            await self.go.wait()
        return await super().chat(messages, tools)


async def test_a_server_that_is_killed_fails_the_rollouts_that_are_in_it(urls):
    with serving() as (process, dying):
        async with words(dying) as subject, words(urls) as lives:
            policies = [Waits() for _ in range(3)]
            pairs = zip(policies, (subject, subject, lives), strict=True)
            running = [asyncio.create_task(play(each, policy, name=f"0-{id(policy)}")) for policy, each in pairs]
            async with asyncio.timeout(60):
                await asyncio.gather(*(policy.waits.wait() for policy in policies))
            process.kill()
            process.wait()
            for policy in policies:
                policy.go.set()
            for each in running[:2]:
                with pytest.raises(Failed, match=r"lost the connection to ws://127\.0\.0\.1:\d+/ws in its step"):
                    await each
            assert summed(await running[2])["reward"] == 1.5
            with pytest.raises(Failed, match="cannot connect to ws://"):
                await play(subject, Says())


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "host"])
async def test_a_worker_trains_on_it_while_weights_are_pushed(urls, inline, monkeypatch):
    monkeypatch.setattr(chat, "chat_turns", lambda config: CHAT)
    subject, queue = engine(), ListQueue(2)
    arguments = {"url": urls["words"], "text_field": "word", "observation_field": "text"}
    made = served(subject, queue, environment=NAME, inline=inline, arguments=arguments, concurrent=3)
    assert await run_with_pushes(subject, made, 5) >= 2
    assert len(queue.groups) == 2
    for rollout in (rollout for group in queue.groups for rollout in group.rollouts):
        assert (rollout.reward, rollout.end, rollout.metrics["step_count"]) == (1.5, "done", 3.0)
        (trajectory,) = rollout.trajectories
        assert int(trajectory.sampled.sum()) == 3 * TURN
