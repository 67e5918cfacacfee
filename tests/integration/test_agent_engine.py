"""An agent over HTTP on the real vLLM engine: what it hears does not change with pauses in the middle of its turns."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from async_rl.config.loading import validate
from async_rl.data.chat_turns import ChatTurns
from async_rl.rollout import chat
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.responses import Responses
from tests.support.agent_sessions import user
from tests.support.engine_checkpoint import EOS, VOCAB, engine_config, make_checkpoint, running
from tests.support.scripted_replica import Digits, ListQueue

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ROLES = {"user": 5, "assistant": 6}
MOST = 40  # tokens of a turn
SAID = {}


def render(messages, _tools, _variables):
    ids = []
    for message in messages:
        ids += [ROLES[message["role"]], *(20 + ord(c) % (VOCAB - 20) for c in message["content"]), EOS, 7]
    return "", [*ids, ROLES["assistant"]]


class Words:
    """A tokenizer whose text of a token is its number."""

    def __len__(self):
        return VOCAB

    def decode(self, token_ids, skip_special_tokens=False, **_):
        return " ".join(str(t) for t in np.asarray(token_ids).tolist() if not (skip_special_tokens and t == EOS))


async def edits(prompt, policy, context):
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:

        async def said(history):
            answer = await client.chat.completions.create(model="m", messages=history, max_tokens=MOST)
            return {"role": "assistant", "content": answer.choices[0].message.content}

        first = [user(f"{context.rollout_id[-1]} of many")]
        first.append(await said(first))
        left, right = [*first, user("on")], [*first, user("not on")]
        left.append(await said(left))
        right.append(await said(right))
        right.append(user("and then"))
        right.append(await said(right))
    SAID[context.rollout_id] = [left, right]
    return float(context.rollout_id[-1])


SAMPLING = Responses.sampling


def greedy(self, *arguments):
    """Training samples at random; only what is greedy can be compared."""
    sampling, stops = SAMPLING(self, *arguments)
    return replace(sampling, greedy=True), stops


def settings(folder, mode="resume"):
    agent = {"function": f"{__name__}:edits"}
    config = engine_config(folder, n=2, agent=agent, stop_token_ids=[2, 3, 4])
    tree = config.model_dump(mode="json", exclude_unset=True)
    return validate({**tree, "async_training": {"partial_rollout": {"mode": mode}}})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny_moe"))
    async with running(settings(folder)) as engine:
        yield folder, engine


async def heard(folder, engine, monkeypatch, mode, *, pushes):
    """Return what the agents of a group heard, the group, and how often the engine was paused."""
    monkeypatch.setattr(chat, "chat_turns", lambda config: ChatTurns(render, {EOS, 2, 3, 4}))
    monkeypatch.setattr(Responses, "sampling", greedy)
    SAID.clear()
    queue, count = ListQueue(1), 0
    made = RolloutReplica(settings(folder, mode), 0, queue, engine, Words(), Digits())
    run = asyncio.create_task(made.run())
    before = engine.sampled_tokens
    async with asyncio.timeout(300):
        while not run.done():
            await asyncio.sleep(0.01)
            if pushes and engine.sampled_tokens >= before + 12:
                await made.pause()
                await engine.update_weight_version(str(engine.version + 1))
                await made.wake()
                await made.resume()
                count, before = count + 1, engine.sampled_tokens
    await run
    await made._worker.close()
    return dict(SAID), queue.groups[0], count


@pytest.mark.parametrize("mode", ["resume", "in_flight", "drain"])
async def test_an_agent_never_hears_of_a_pause(engine, monkeypatch, mode):
    folder, engine = engine
    alone, _, _ = await heard(folder, engine, monkeypatch, mode, pushes=False)
    with_pushes, group, count = await heard(folder, engine, monkeypatch, mode, pushes=True)
    assert with_pushes == alone
    assert count >= 2
    for rollout in group.rollouts:
        assert len(rollout.trajectories) >= 2
        for trajectory in rollout.trajectories:
            assert len(trajectory.routed_experts) == trajectory.num_tokens - 1
        if mode != "drain":
            assert any(trajectory.is_partial for trajectory in rollout.trajectories)
        first, fork, *_ = rollout.trajectories
        shared = [*first.prompt_ids.tolist(), int(first.response_ids[0])]
        assert fork.prompt_ids.tolist()[: len(shared)] == shared
