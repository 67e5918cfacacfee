"""Agents through a worker that ask over HTTP: pushes in every mode, what fails, programs and what is left of them."""

import asyncio
import os
import sys

import numpy as np
import pytest
from openai import AsyncOpenAI
from prometheus_client import generate_latest

from async_rl.config.loading import validate
from async_rl.doctor.inputs import functions
from async_rl.errors import AgentFailure, ConfigError, EngineDied
from async_rl.metrics.exporter import Metrics
from async_rl.rollout import chat
from async_rl.rollout.agent_program import run_program
from async_rl.rollout.policy import Address
from tests.support.agent_sessions import CHAT, user
from tests.support.groups import rewarded
from tests.support.scripted_engine import Fault
from tests.support.scripted_replica import ListQueue
from tests.support.served_agents import TURN, engine, of, run_with_pushes, served, until

SAID = {}  # what agents heard, by rollout


@pytest.fixture(autouse=True)
def small_template(monkeypatch):
    monkeypatch.setattr(chat, "chat_turns", lambda config: CHAT)
    SAID.clear()


async def three_turns(prompt, policy, context):
    """A turn that extends, then one behind an edited history, then one that extends the fork."""
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:

        async def said(history):
            answer = await client.chat.completions.create(model=policy.model, messages=history, stream=len(history) > 3)
            if len(history) <= 3:
                return {"role": "assistant", "content": answer.choices[0].message.content}
            return {
                "role": "assistant",
                "content": "".join([chunk.choices[0].delta.content or "" async for chunk in answer]),
            }

        first = [user(f"q{context.rollout_id[-1]}")]
        first.append(await said(first))
        left = [*first, user("b")]
        left.append(await said(left))
        edited = [*first, user("c")]
        edited.append(await said(edited))
        edited.append(user("d"))
        edited.append(await said(edited))
    SAID[context.rollout_id] = [left, edited]
    return {"reward": float(context.rollout_id[-1]), "turns": 4.0}


async def said_without_pushes():
    subject, queue = engine(), ListQueue(1)
    await run_with_pushes(subject, served(subject, queue, function=f"{__name__}:three_turns"), None)
    assert all(not t.is_partial for t, _ in rewarded(queue.groups[0]))
    return dict(SAID)


@pytest.mark.parametrize("mode", ["resume", "in_flight", "drain"])
async def test_what_an_agent_hears_is_the_same_with_a_push_in_every_turn(mode):
    alone = await said_without_pushes()
    SAID.clear()
    subject, queue = engine(), ListQueue(1)
    made = served(subject, queue, mode, function=f"{__name__}:three_turns")
    pushes = await run_with_pushes(subject, made, 2)
    assert pushes >= 4
    assert alone == SAID
    assert len(alone) == 2
    (group,) = queue.groups
    for rollout in group.rollouts:
        assert (rollout.end, len(rollout.trajectories)) == ("done", 2)
        whole = {t.trajectory_id: [*t.prompt_ids.tolist(), *t.response_ids.tolist()] for t in rollout.trajectories}
        calls = [(name, sent) for name, sent in subject.sent if name in whole]
        assert len(calls) >= 4
        for name, sent in calls:  # invariant 12
            assert whole[name][: len(sent)] == sent
        first, fork = rollout.trajectories
        assert int(first.sampled.sum() + fork.sampled.sum()) == 4 * TURN
        shared = len(first.prompt_ids) + TURN
        assert whole[fork.trajectory_id][:shared] == whole[first.trajectory_id][:shared]
        for trajectory in rollout.trajectories:
            assert trajectory.versions[trajectory.sampled].tolist() == (
                (-0.5 - trajectory.logprobs[trajectory.sampled]).astype(int).tolist()
            )
            said = np.split(trajectory.versions[trajectory.sampled], range(TURN, trajectory.sampled.sum(), TURN))
            assert all((len(set(turn.tolist())) > 1) == (mode != "drain") for turn in said), "a push in every turn"
    assert made._worker.agents["rollout.agent"].ways == {"first": 2, "extended": 4, "edited": 2}
    assert made._worker.agents["rollout.agent"].gateway.requests == {("chat", 200): 8}
    metrics = Metrics("rollout")
    made._worker.agents.publish(metrics)
    exposed = generate_latest(metrics.registry).decode()
    assert 'async_rl_gateway_requests_total{code="200",endpoint="chat"' in exposed
    assert 'async_rl_agent_turns_total{agent="agent",how="edited"' in exposed


async def catches_all(prompt, policy, context):
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:
        while True:
            try:
                await client.chat.completions.create(model="m", messages=[user("a")])
            except Exception:  # noqa: BLE001
                await asyncio.sleep(0.01)


async def test_a_dead_engine_ends_the_run_whatever_the_agent_makes_of_the_error():
    subject, queue = engine(Fault("die", after_tokens=3)), ListQueue(1)
    made = served(subject, queue, function=f"{__name__}:catches_all")
    async with asyncio.timeout(60):
        with pytest.raises(EngineDied):
            await made.run()
    await made.shutdown()


async def sleeps(prompt, policy, context):
    await policy.chat([user("a")])
    await asyncio.sleep(3600)


async def test_a_rollout_that_takes_too_long_is_ended():
    subject = engine()
    made = served(subject, ListQueue(1), function=f"{__name__}:sleeps", timeout_s=0.3)
    async with asyncio.timeout(60):
        with pytest.raises(AgentFailure, match=r"has not ended after 0\.3 s \(rollout\.agent\.timeout_s\)"):
            await made.run()
    await made.shutdown()


PROGRAM = """
import json, os, sys
from openai import OpenAI

row = json.load(sys.stdin)
client = OpenAI()
answer = client.chat.completions.create(
    model=os.environ["OPENAI_MODEL"], messages=[{"role": "user", "content": row["prompt"]}]
)
print("talk")
print(json.dumps({"reward": len(answer.choices[0].message.content.split()), "rows": 1.0}))
"""


async def test_a_program_gets_the_row_and_the_policy_and_writes_the_reward(tmp_path):
    path = tmp_path / "agent.py"
    path.write_text(PROGRAM)
    subject, queue = engine(), ListQueue(1)
    await run_with_pushes(subject, served(subject, queue, command=[sys.executable, str(path)]), 2)
    (group,) = queue.groups
    for rollout in group.rollouts:
        assert (rollout.reward, rollout.reward_parts) == (TURN - 1.0, {"rows": 1.0})
        assert rollout.trajectories[0].is_partial


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("print('well')", "wrote 'well' as its last line, which must be the reward as JSON"),
        ("pass", "wrote nothing; the last line"),
        ("import sys; print(1); sys.exit('no tool')", "ended with status 1; its standard error ends with: no tool"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status 137"),
        ("print('\"good\"')", "returned 'good'"),
    ],
)
async def test_a_program_that_fails_is_named(code, match):
    subject = engine()
    made = served(subject, ListQueue(1), command=[sys.executable, "-c", code])
    with pytest.raises(AgentFailure, match=rf"rollout\.agent\.command .*prompt 0-0.*: {match}"):
        await made.run()
    await made.shutdown()


async def test_a_program_that_is_not_there_is_named():
    made = served(engine(), ListQueue(1), command=["no-such-agent"])
    with pytest.raises(AgentFailure, match=r"status 127.*no-such-agent: No such file"):
        await made.run()
    await made.shutdown()


# Starts a child in its group, one in a session of its own, and one whose parent has ended; none minds SIGTERM.
LINGERS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(3600)", sys.argv[1]]
subprocess.Popen(sleep)
subprocess.Popen(sleep, start_new_session=True)
if os.fork() == 0:
    subprocess.Popen(sleep, start_new_session=True)
    os._exit(0)
open(sys.argv[1] + f"/{os.getpid()}", "w").close()
if sys.argv[2] == "waits":
    time.sleep(3600)
print(1.0)
"""


@pytest.mark.parametrize("end", ["of itself", "time", "cancel"])
async def test_nothing_of_a_program_is_left(tmp_path, end):
    command = [sys.executable, "-c", LINGERS, str(tmp_path), "ends" if end == "of itself" else "waits"]
    settings = {"timeout_s": 2.0} if end == "time" else {}
    made = served(engine(), ListQueue(1), command=command, **settings)
    run = asyncio.create_task(made.run())
    await until(lambda: len(list(tmp_path.iterdir())) == 2)
    if end == "cancel":
        assert len(of(tmp_path)) >= 4
        run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await made.shutdown()
    await until(lambda: not of(tmp_path))


async def test_nothing_of_a_program_is_left_when_its_worker_is_killed(tmp_path):
    code = (
        "import asyncio, sys\n"
        "from async_rl.rollout.agent_program import run_program\n"
        "from async_rl.rollout.policy import Address\n"
        "asyncio.run(run_program(sys.argv[1:], {}, Address('u', 'k', 'm'), 'r'))\n"
    )
    program = [sys.executable, "-c", LINGERS, str(tmp_path), "waits"]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *program, env=dict(os.environ))
    await until(lambda: list(tmp_path.iterdir()) and len(of(tmp_path)) >= 5)
    process.kill()
    await process.wait()
    await until(lambda: not of(tmp_path))


async def test_a_program_gets_the_row_and_no_token_of_the_run(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    code = (
        "import json, os, sys; row = json.load(sys.stdin); print(json.dumps({'reward': 0, 'read': len(row['prompt']),"
        "'id': os.environ['ASYNC_RL_ROLLOUT_ID'], 'token': os.environ.get('RAY_AUTH_TOKEN')}))"
    )
    found = await run_program([sys.executable, "-c", code], {"prompt": "p" * 200_000}, Address("u", "k", "m"), "r/0")
    assert found == {"reward": 0, "read": 200_000, "id": "r/0", "token": None}


def test_one_agent_is_named_and_the_doctor_looks_for_a_program():
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    both = {"function": f"{__name__}:sleeps", "command": ["a"]}
    with pytest.raises(ConfigError, match=r"rollout\.agent\.function is .*, and rollout\.agent\.command is"):
        validate({**tree, "rollout": {"agent": both}})
    for name, status in ((sys.executable, "ok"), ("no-such-agent", "FAIL")):
        config = validate({**tree, "rollout": {"agent": {"command": [name, "x"]}}})
        (found,) = [check for check in functions(config) if check.name == "rollout.agent.command"]
        assert found.status == status
