"""How a call of the vLLM engine ends, by each of vLLM's finish reasons. Without vLLM."""

import asyncio
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from async_rl.errors import EngineError
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.engine.vllm import engine as vllm_engine
from async_rl.rollout.engine.vllm.engine import VllmEngine
from async_rl.rollout.engine.vllm.ranks import Ranks


class Unlike(Exception):
    """An exception of vLLM that does not occur here."""


@pytest.fixture
def engine(monkeypatch):
    """An engine whose calls end by the reasons in ``ends``, one after the other; ``waits`` has its pauses between."""
    kinds = {"EngineDeadError": Unlike, "EngineGenerateError": Unlike, "VLLMClientError": Unlike}
    module = SimpleNamespace(
        SamplingParams=SimpleNamespace, RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"), **kinds
    )
    for name in (
        "vllm", "vllm.sampling_params", "vllm.exceptions", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.exceptions",
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    subject = VllmEngine.__new__(VllmEngine)
    subject._replica, subject._version, subject._ended_tokens, subject._stop_token_ids = 0, 7, 0, [2]
    subject._config = SimpleNamespace(rollout=SimpleNamespace(return_routed_experts=False))
    subject._ranks = Ranks(1, spread=1)
    subject._running = asyncio.Event()
    subject._running.set()
    subject.ends, subject.waits, sleep = [], [], asyncio.sleep

    async def run(_request_id, _token_ids, params, _sampling, _rank):
        subject.asked = params
        completion = SimpleNamespace(
            finish_reason=subject.ends.pop(0), token_ids=[3, 4], logprobs=SimpleNamespace(logprobs=[-1.0, -2.0]),
            routed_experts=None,
        )  # fmt: skip
        return vllm_engine._Call("r"), SimpleNamespace(outputs=[completion], num_cached_tokens=16)

    async def wait(seconds):
        subject.waits.append(seconds)
        await sleep(0)

    subject._run = run
    monkeypatch.setattr(vllm_engine.asyncio, "sleep", wait)
    return subject


def generate(engine):
    return engine.generate("0-1.0/0/0", np.array([5], np.int32), Sampling(1.0, 1.0), 8)


@pytest.mark.parametrize(
    ("reason", "end"), [("stop", "stop"), ("length", "length"), ("abort", "abort"), ("repetition", "length")]
)
async def test_a_call_that_ended_has_its_tokens_and_one_of_three_ends(engine, reason, end):
    engine.ends = [reason]
    output = await generate(engine)
    assert (output.finish_reason, output.token_ids.tolist(), output.versions.tolist()) == (end, [3, 4], [7, 7])
    assert output.cached_tokens == 16
    assert engine.waits == []


async def test_a_call_samples_as_it_is_asked_to(engine):
    engine.ends = ["stop"] * 2
    for sampling, expected in (
        (Sampling(0.6, 0.9, top_k=20), (0.6, 0.9, 20)),
        (Sampling(0.6, 0.9, greedy=True, top_k=20), (0.0, 1.0, 0)),
    ):
        await engine.generate("eval/eval-aime-1/0/0", np.array([5], np.int32), sampling, 8)
        assert (engine.asked.temperature, engine.asked.top_p, engine.asked.top_k) == expected


async def test_a_call_that_failed_inside_the_engine_is_repeated_after_longer_and_longer_pauses(engine):
    engine.ends = ["error", "error", "error", "stop"]
    assert (await generate(engine)).finish_reason == "stop"
    assert engine.waits == [0.2, 0.4, 0.8]
    assert engine._ended_tokens == 2, "tokens of the attempts that failed are none of a response"


async def test_a_call_that_always_fails_is_an_error_of_that_call(engine):
    engine.ends = ["error"] * 5
    with pytest.raises(EngineError, match=r"replica 0: 0-1\.0/0/0: the engine failed the call 4 times"):
        await generate(engine)
    assert engine.ends == ["error"]


async def test_an_end_that_is_not_known_is_an_error_of_that_call(engine):
    engine.ends = ["content_filter"]
    with pytest.raises(EngineError, match="replica 0: a call has ended by 'content_filter'"):
        await generate(engine)
