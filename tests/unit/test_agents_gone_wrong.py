"""What agents over HTTP do wrong, and what dies under them, costs one rollout: each case through a real worker."""

import asyncio
import json
import os
import signal
import sys

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from async_rl.errors import AgentFailure, EngineDied
from async_rl.rollout.gateway import endpoint
from tests.support import asking_program
from tests.support.agent_sessions import CHAT, user
from tests.support.scripted_engine import Fault
from tests.support.scripted_replica import ROUTING, ListQueue, snapshot
from tests.support.served_agents import TURN, Turns, engine, run_with_pushes, served, until

SHARED = {}  # between the agents of a test
ALONE = {"n": 3, "rollout": {"min_group_size": 2}, "on_error": "skip"}  # a group can do without one rollout


@pytest.fixture(autouse=True)
def small_template(monkeypatch):
    monkeypatch.setattr("async_rl.rollout.chat.chat_turns", lambda config: CHAT)
    SHARED.clear()


def client(policy, **settings):
    return AsyncOpenAI(**{"base_url": policy.base_url, "api_key": policy.api_key, "max_retries": 0} | settings)


async def said(asked, history):
    """Return the policy's message."""
    answer = await asked.chat.completions.create(model="m", messages=history)
    return {"role": "assistant", "content": answer.choices[0].message.content}


def first(context):
    return context.rollout_id.endswith("/0")


async def run(made):
    """Run a worker to its end, and return the group's rollouts by index."""
    async with asyncio.timeout(60):
        await made.run()
    await made.shutdown()
    (group,) = made._worker._queue.groups
    return {int(rollout.rollout_id[-1]): rollout for rollout in group.rollouts}


def nothing_is_under_way(made):
    endpoints = made._worker.agents["rollout.agent"].gateway._endpoints
    return not made._gate.calls and not made._engine._calls.count and not endpoints


async def rewrites(prompt, policy, context):
    """Rewrite the history at every turn, as harnesses do that count their turns in the system's text."""
    async with client(policy) as asked:
        history, turns = [user("0")], 0
        try:
            while not (turns == 3 and not first(context)):
                history += [await said(asked, history), user("on")]
                turns += 1
                if first(context):
                    history[0] = user(f"{turns}")
        except openai.BadRequestError as error:
            SHARED["code"] = error.code
            if SHARED.get("raises"):
                raise
    return float(turns)


@pytest.mark.parametrize("raises", [False, True])
async def test_a_harness_that_rewrites_its_history_ends_alone_by_the_limit_of_branches(raises):
    SHARED["raises"] = raises
    made = served(engine(), ListQueue(1), function=f"{__name__}:rewrites", max_branches=4, **ALONE)
    rollouts = await run(made)
    assert SHARED["code"] == "rollout_budget_exceeded"
    assert (rollouts[1].end, len(rollouts[1].trajectories), rollouts[1].reward) == ("done", 1, 3.0)
    if raises:
        assert rollouts.keys() == {1, 2}
    else:
        assert (rollouts[0].end, len(rollouts[0].trajectories), rollouts[0].reward) == ("truncated", 4, 4.0)
    assert made._worker.agents["rollout.agent"].ways == {"first": 3, "extended": 4, "root": 3}


async def asks_with_the_key_of_another(prompt, policy, context):
    if first(context):
        SHARED["policy"] = policy
    await until(lambda: "policy" in SHARED)
    async with client(SHARED["policy"]) as asked:
        history = [user(context.rollout_id[-1])]
        for _ in range(3):
            history += [await said(asked, history), user("on")]
    if first(context):
        await until(lambda: "done" in SHARED)
    SHARED["done"] = True
    return 1.0


async def test_two_rollouts_with_one_key_are_branches_of_one_and_no_token_is_in_two():
    rollouts = await run(served(engine(), ListQueue(1), function=f"{__name__}:asks_with_the_key_of_another"))
    assert [len(rollouts[index].trajectories) for index in (0, 1)] == [2, 0]
    assert [int(made.sampled.sum()) for made in rollouts[0].trajectories] == [3 * TURN] * 2


async def compacts(prompt, policy, context):
    async with client(policy) as asked:
        history = [user("a" * 30)]
        try:
            while True:
                history += [await said(asked, history), user("b" * 30)]
        except openai.BadRequestError as error:
            SHARED["code"] = error.code
        await said(asked, [user("what was said so far"), user("on")])
    return 1.0


async def test_an_agent_that_has_no_room_gets_that_answer_and_may_compact_its_history():
    rollouts = await run(served(engine(), ListQueue(1), function=f"{__name__}:compacts"))
    assert SHARED["code"] == "context_length_exceeded"
    for rollout in rollouts.values():
        assert (rollout.end, len(rollout.trajectories)) == ("truncated", 2)


async def leaves_a_straggler(prompt, policy, context):
    async def asks_on():
        async with client(policy) as asked:
            try:
                while True:
                    await said(asked, [user("x")])
            except openai.AuthenticationError:
                SHARED["refused"] = SHARED.get("refused", 0) + 1

    async with client(policy) as asked:
        await said(asked, [user("a")])
    if prompt.prompt_id == "0-1":
        SHARED.setdefault("tasks", []).append(asyncio.create_task(asks_on()))
        await asyncio.sleep(0.05)
        raise ValueError("given up")
    await asyncio.sleep(0.3)
    return 1.0


async def test_the_straggler_of_an_attempt_that_has_ended_writes_into_no_other():
    queue = ListQueue(2)
    made = served(engine(), queue, function=f"{__name__}:leaves_a_straggler", on_error="skip")
    await run(made)
    await asyncio.gather(*SHARED["tasks"])
    assert (SHARED["refused"], queue.failed) == (2, [("0-1.0", "agent")])
    assert all(len(rollout.trajectories) == 1 for rollout in queue.groups[0].rollouts)


async def tries_its_old_key(prompt, policy, context):
    attempts = SHARED.setdefault(context.rollout_id, [])
    attempts.append(policy.api_key)
    async with client(policy) as asked:
        if len(attempts) > 1:
            root = policy.base_url.partition("/r/")[0]
            async with client(policy, base_url=f"{root}/v1", api_key=attempts[0]) as old:
                with pytest.raises(openai.AuthenticationError):
                    await said(old, [user("a")])
        try:
            history = [user("a")]
            history += [await said(asked, history), user("b")]
            await said(asked, history)
        except openai.InternalServerError as error:
            SHARED.setdefault("statuses", []).append(error.status_code)
            raise
    return 1.0


async def test_an_engine_that_dies_is_said_by_503_and_the_rollout_is_made_again_with_another_key():
    subject = engine(Fault("die", after_tokens=TURN + 3))
    made = served(subject, ListQueue(1), function=f"{__name__}:tries_its_old_key")
    async with asyncio.timeout(60):
        with pytest.raises(EngineDied):
            await made.run()
    messages = await snapshot(made)
    await made.shutdown()
    assert SHARED["statuses"]
    assert set(SHARED["statuses"]) == {503}
    heir = served(engine(), ListQueue(0), function=f"{__name__}:tries_its_old_key")
    assert await heir.adopt(*messages.values()) == ["0-0.0"]
    rollouts = await run(heir)
    for rollout in rollouts.values():
        assert len(set(SHARED[rollout.rollout_id])) == 2, "made twice, each time with a key of its own"
        assert [int(t.sampled.sum()) for t in rollout.trajectories] == [2 * TURN]


class Held(Turns):
    """An engine whose calls begin when ``go`` is set."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.go, self.waiting = asyncio.Event(), 0

    async def generate(self, *call):
        self.waiting += 1
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1
        return await super().generate(*call)


@pytest.mark.parametrize("stage", ["waits for a turn", "between turns"])
async def test_a_program_that_is_killed_costs_its_rollout_alone(tmp_path, stage):
    subject, stages, may_go_on = engine(kind=Held), tmp_path / "stages", tmp_path / "go"
    command = [sys.executable, "-I", "-S", asking_program.__file__, str(stages), str(may_go_on)]
    made = served(subject, ListQueue(1), command=command, **ALONE)
    running = asyncio.create_task(run(made))

    def reached():
        return [json.loads(line)[:2] for line in stages.read_text().splitlines()] if stages.exists() else []

    if stage == "waits for a turn":
        await until(lambda: subject.waiting == 3)
    else:
        subject.go.set()
        await until(lambda: [name for _, name in reached()].count("first") == 3)
    program = reached()[0][0]
    os.kill(program, signal.SIGKILL)
    await until(lambda: len(made._worker.agents["rollout.agent"].gateway._endpoints) == 2)
    if stage == "waits for a turn":
        await until(lambda: subject.waiting == 2)
    subject.go.set()
    may_go_on.touch()
    rollouts = await running
    assert len(rollouts) == 2
    for rollout in rollouts.values():
        assert (rollout.reward_parts, len(rollout.trajectories)) == ({"turns": 2.0}, 2), "nothing is said between them"
    assert nothing_is_under_way(made)


async def gives_up_waiting(prompt, policy, context):
    async with client(policy) as asked:
        turn = asyncio.create_task(said(asked, [user("a")]))
        if first(context):
            await until(lambda: SHARED["engine"].waiting == 2)
            turn.cancel()
            SHARED["dropped"] = True
            if SHARED.get("asks again"):
                await until(lambda: SHARED["engine"].waiting == 1)
                SHARED["engine"].go.set()
                await said(asked, [user("b")])
            return 0.0
        await turn
    return 1.0


@pytest.mark.parametrize("again", [False, True])
async def test_a_turn_whose_client_has_gone_is_given_up_with_the_rollout_or_after_a_while(monkeypatch, again):
    monkeypatch.setattr(endpoint, "REPEAT_WITHIN_S", 0.05 if again else 60.0)
    subject = engine(kind=Held)
    SHARED.update({"engine": subject, "asks again": again})
    made = served(subject, ListQueue(1), function=f"{__name__}:gives_up_waiting")
    running = asyncio.create_task(run(made))
    await until(lambda: "dropped" in SHARED and subject.waiting == 1)
    subject.go.set()
    rollouts = await running
    assert [int(t.sampled.sum()) for t in rollouts[1].trajectories] == [TURN]
    assert [t.prompt_ids.tolist() for t in rollouts[0].trajectories] == (
        [CHAT.for_row({}).prompt([user("b")], None)] * again
    )
    assert nothing_is_under_way(made)


async def four_turns(prompt, policy, context):
    async with client(policy) as asked:
        history = [user("a")]
        for _ in range(4):
            history += [await said(asked, history), user("b")]
    return 1.0


@pytest.mark.parametrize("routing", ["replace", "preserve", "exact"])
@pytest.mark.parametrize("after", [0, TURN, 3 * TURN])
async def test_turns_that_a_push_ends_before_their_first_token_have_whole_routing(routing, after):
    """As miles #1672 and verl #6046 had it: an aborted turn has no routed experts, and the merge crashed."""
    subject, queue = engine(Fault("abort", after_tokens=after)), ListQueue(1)
    made = served(subject, queue, partial_rollout={"routing": routing}, function=f"{__name__}:four_turns")
    assert await run_with_pushes(subject, made, 3) >= 4
    for rollout in queue.groups[0].rollouts:
        (trajectory,) = rollout.trajectories
        assert len(trajectory.routed_experts) == trajectory.num_tokens - 1
        assert int(trajectory.sampled.sum()) == 4 * TURN
        # The scripted engine's rows name the version that computed them, which sampled the token after them. With
        # ``replace`` those of earlier calls are gone.
        before = len(trajectory.prompt_ids) - 1
        for segment in trajectory.segments[-1:] if routing == "replace" else trajectory.segments:
            rows = trajectory.routed_experts if segment.routed_experts is None else segment.routed_experts
            computed = rows[before + segment.start : before + segment.stop, 0, 0]
            assert set(computed.tolist()) == {segment.version % ROUTING.num_experts}


REWARDS = {
    "numpy": (np.float32(0.5), 0.5),
    "numpy.bool": (np.True_, 1.0),
    "dict": ({"score": 0.5, "other": 1}, 0.5),
    "nan": (float("nan"), None),
    "text": ("1.0", None),
}


async def rewarded_as(prompt, policy, context):
    await policy.chat([user("a")])
    return SHARED["reward"]


@pytest.mark.parametrize("kind", REWARDS)
async def test_a_reward_of_an_agent_is_a_number_of_any_kind_or_named(kind):
    """As verl's users return them (ms-swift #8123, TRL #5775): one that is none must not poison its group."""
    SHARED["reward"], expected = REWARDS[kind]
    made = served(engine(), ListQueue(1), function=f"{__name__}:rewarded_as")
    if expected is None:
        with pytest.raises(AgentFailure, match=r"prompt 0-0 \(dataset row 1\)"):
            await made.run()
        await made.shutdown()
    else:
        assert {rollout.reward for rollout in (await run(made)).values()} == {expected}
