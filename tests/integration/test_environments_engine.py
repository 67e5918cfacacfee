"""Environments of other libraries on the real vLLM engine, with pushes: transformers computes what each turn sampled.

What such environments do, and what becomes of their faults, is tested around a scripted engine: ``test_mcp_tools.py``,
``test_verifiers.py``. One engine serves the module; float32, CPU.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from async_rl.config.loading import validate
from async_rl.data.tokenizer import load_tokenizer
from async_rl.rollout.actor import RolloutReplica
from async_rl.trainer.samples import samples_of
from tests.integration.engine_conformance import reference, token_logprobs
from tests.support.engine_checkpoint import engine_config, pushing, running
from tests.support.guesses import LIBRARIES, V0, V1
from tests.support.needs import NEEDS_VERIFIERS, NEEDS_VERIFIERS_V1
from tests.support.oracle import EXACT, load_versions, make_versions
from tests.support.scripted_replica import Digits, ListQueue
from tests.support.tool_model import make_tool_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = 3  # unlike weights; policy versions go through them again and again
GROUPS, ROLLOUTS = 4, 2
EVERY = 40  # sampled tokens, of all rollouts together, between two pushes

MCP = {
    "environment": "async_rl.rollout.environments.mcp:McpTools",
    "arguments": {
        "servers": {
            "tools": {
                "command": [sys.executable, "-m", "tests.support.mcp_tools"],
                "env": {"PYTHONPATH": str(ROOT)},
                "tools": ["look"],
            }
        },
        "reward": "tests.support.mcp_tools:worth",
    },
}


def settings(folder, agent=None):
    config = engine_config(folder, n=ROLLOUTS, max_response_tokens=300, **({"agent": agent} if agent else {}))
    tree = config.model_dump(mode="json", exclude_unset=True)
    return validate({**tree, "async_training": {"partial_rollout": {"routing": "exact"}}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    first = make_tool_model(tmp_path_factory.mktemp("version0"))
    return make_versions(first, VERSIONS, lambda version: tmp_path_factory.mktemp(f"version{version}"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folders):
    async with running(settings(folders[0])) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pusher(engine, folders):
    async with pushing(engine, load_versions(folders)[0]) as pusher:
        yield pusher


async def played(folders, engine, pusher, agent, fields):
    """Return the rollouts of a worker whose engine gets other weights again and again, and the number of pushes."""
    weights, queue = load_versions(folders), ListQueue(GROUPS, fields)
    config = settings(folders[0], agent)
    worker = RolloutReplica(config, 0, queue, engine, load_tokenizer(config), Digits())
    run, before, first = asyncio.create_task(worker.run()), engine.sampled_tokens, pusher.version
    async with asyncio.timeout(300):
        while not run.done():
            await asyncio.sleep(0.01)
            if engine.sampled_tokens >= before + EVERY:
                await worker.pause()
                await pusher.send(weights[(pusher.version + 1) % VERSIONS])
                await worker.wake()
                await worker.resume()
                before = engine.sampled_tokens
    await run
    await worker._worker.close()
    assert not queue.failed
    return [rollout for group in queue.groups for rollout in group.rollouts], pusher.version - first


@pytest.mark.parametrize(
    ("agent", "fields", "heard", "turns"),
    [
        pytest.param(MCP, {"prompt": [{"role": "user", "content": "Look."}]}, "is seen", 1, id="mcp"),
        pytest.param(V0.agent(), V0.row(turns=3), "no 2", 3, id="verifiers 0.3", marks=NEEDS_VERIFIERS),
        pytest.param(V1.agent(), V1.row(turns=3), "no 2", 3, id="verifiers 0.4", marks=NEEDS_VERIFIERS_V1),
        pytest.param(
            V1.agent(args={"taskset": {"shared_tools": True}}),
            V1.row(turns=1),
            "seen ",
            1,
            id="verifiers 0.4, tools",
            marks=NEEDS_VERIFIERS_V1,
        ),
    ],
)
async def test_each_token_has_the_log_prob_and_the_experts_of_the_weights_that_sampled_it(
    folders, engine, pusher, monkeypatch, tmp_path, agent, fields, heard, turns
):
    monkeypatch.setenv("ENVIRONMENTS_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(LIBRARIES))
    rollouts, pushes = await played(folders, engine, pusher, agent, fields)
    assert len(rollouts) == GROUPS * ROLLOUTS
    assert "done" in (ends := {rollout.end for rollout in rollouts})
    assert ends <= {"done", "truncated"}
    assert pushes >= 3
    trajectories = [trajectory for rollout in rollouts for trajectory in rollout.trajectories]
    tokenizer = load_tokenizer(settings(folders[0]))
    assert any(heard in tokenizer.decode(each.response_ids.tolist()) for each in trajectories)
    assert any(each.is_partial for each in trajectories)
    made = [(rollout.end, [len(each.segments) for each in rollout.trajectories]) for rollout in rollouts]
    assert all(len(each.segments) >= turns for each in trajectories), made
    models = [reference(folder) for folder in folders]
    tokens = 0
    for trajectory in trajectories:
        samples = samples_of(trajectory, oldest_version=0, per_segment=True)
        assert len(samples) == len(trajectory.segments)
        for segment, sample in zip(trajectory.segments, samples, strict=True):
            logits, routing = models[segment.version % VERSIONS](sample.token_ids)
            mask = sample.loss_mask.astype(bool)
            wanted = token_logprobs(logits, sample.token_ids)[mask]
            np.testing.assert_allclose(sample.logprobs[mask], wanted, atol=EXACT)
            np.testing.assert_array_equal(np.sort(sample.routed_experts[: len(routing) - 1]), np.sort(routing[:-1]))
            tokens += int(mask.sum())
    assert tokens == sum(int(trajectory.sampled.sum()) for trajectory in trajectories)
