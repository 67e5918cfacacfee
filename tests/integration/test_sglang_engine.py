"""The real SGLang engine on a tiny MoE: one server for the whole module, in float32, on CPU.

What every engine must do is in ``engine_conformance.py``; below is what only SGLang does.
"""

from __future__ import annotations

import asyncio
import sys
from unittest import mock

import numpy as np
import psutil
import pytest
import pytest_asyncio

from async_rl.errors import EngineDied, EngineError
from async_rl.rollout.engine.sglang import answers
from tests.integration.engine_conformance import *  # noqa: F403
from tests.integration.engine_conformance import GREEDY, SHORT_PROMPT
from tests.support.engine_checkpoint import engine_config, make_checkpoint, running, until_sampled
from tests.support.needs import NEEDS_SGLANG
from tests.support.processes import alive, shared_files

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    NEEDS_SGLANG,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny_moe"), dense=())


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return engine_config(folder, runs=runs, engine="sglang", max_num_batched_tokens=64)


@pytest.fixture
def atol():
    """SGLang's order of additions depends on how many tokens a step computes."""
    return 1e-5


@pytest.fixture
def ends_unstarted():
    """A call that is frozen before a token has arrived is withdrawn, and ends with one that was on its way."""
    return True


@pytest.fixture
def new_after_wait():
    """It waits for all calls that were begun."""
    return 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config):
    # So that tests can aim at single tokens.
    with mock.patch.object(answers, "STREAM_INTERVAL", 1):
        async with running(config) as engine:
            yield engine


async def test_a_call_that_is_cancelled_leaves_the_engine(engine):
    call = asyncio.create_task(engine.generate("cancelled", SHORT_PROMPT, GREEDY, 200))
    await until_sampled(engine, 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(20):
        while True:  # it refuses while a request is there
            try:
                return await engine._post("/flush_cache", {})
            except EngineError:
                await asyncio.sleep(0.01)


async def test_a_long_answer_comes_in_parts_and_is_the_same(engine):
    await engine.generate("cached", SHORT_PROMPT, GREEDY, 1)  # so that both begin with the same prefix in the cache
    whole = await engine.generate("parts-1", SHORT_PROMPT, GREEDY, 100)
    with mock.patch.object(answers, "STREAM_INTERVAL", 16):
        other = await engine.generate("parts-16", SHORT_PROMPT, GREEDY, 100)
    np.testing.assert_array_equal(other.token_ids, whole.token_ids)
    np.testing.assert_array_equal(other.logprobs, whole.logprobs)
    np.testing.assert_array_equal(other.routed_experts, whole.routed_experts)


async def test_the_server_answers_only_calls_with_its_key(engine):
    async with engine._session.get("/server_info", headers={"Authorization": "Bearer guessed"}) as response:
        assert response.status == 401
    server = engine._server._process.pid
    listening = [c.laddr for c in psutil.Process(server).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}


async def watch(engine):
    while True:
        engine.check_alive()
        await asyncio.sleep(0.05)


async def test_a_server_that_is_killed_is_noticed_and_leaves_nothing(config):
    """The scheduler alone, which takes calls with it; then what is left, at the end."""
    before = shared_files()
    async with running(config) as engine:
        assert shared_files() - before, "there is something to leave behind"
        call = asyncio.create_task(engine.generate("lost", SHORT_PROMPT, GREEDY, 200))
        await until_sampled(engine, 1)
        members, folder = [*engine._server._members], engine._server.folder
        scheduler = next(each for each in members if "scheduler" in " ".join([each.name(), *each.cmdline()]))
        scheduler.kill()
        with pytest.raises(EngineDied):
            await asyncio.wait_for(watch(engine), 60)
        await engine.shutdown()
        with pytest.raises(EngineError):
            await call
        assert [each for each in members if alive(each)] == []
        assert not folder.exists()
    assert shared_files() - before == set()


def with_python(config, path, text, runs):
    """Settings with a program in place of Python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    sglang = config.rollout.sglang.model_copy(update={"python": path})
    return config.model_copy(update={"runs": runs, "rollout": config.rollout.model_copy(update={"sglang": sglang})})


async def test_a_server_that_does_not_start_says_why(config, tmp_path):
    says = f'case "$2" in *versions.py) exec {sys.executable} "$@";; *) echo "ValueError: no such thing" >&2;; esac'
    broken = with_python(config, tmp_path / "python", says, tmp_path / "runs")
    with pytest.raises(EngineError, match=r"replica 0: the SGLang server did not start: ValueError: no such .*\.log"):
        async with running(broken):
            raise AssertionError("it started")


async def test_a_python_without_sglang_is_refused_before_the_start(config, tmp_path):
    broken = with_python(config, tmp_path / "python", "exit 7", tmp_path / "runs")
    with pytest.raises(EngineError, match=r"replica 0: rollout\.sglang\.python is .*exit code 7: it said nothing"):
        async with running(broken):
            raise AssertionError("it started")
    assert not (tmp_path / "runs").exists()
