"""The real vLLM engine on a tiny MoE with a dense layer in it: one engine for the whole module, in float32, on CPU.

What every engine must do is in ``engine_conformance.py``; below is what only vLLM does.
"""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from async_rl.errors import WeightSyncError
from async_rl.rollout import aside
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.engine.vllm.engine import VllmEngine
from tests.integration.engine_conformance import *  # noqa: F403
from tests.integration.engine_conformance import GREEDY, RANDOM, SHORT_PROMPT, reference
from tests.support.engine_checkpoint import engine_config, make_checkpoint, perturbed, running, until_sampled

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny_moe"))


@pytest.fixture(scope="module")
def config(folder):
    # A long prompt takes four steps, so that there is a middle of its prefill.
    return engine_config(folder, max_num_batched_tokens=64)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config):
    async with running(config) as engine:
        yield engine


async def test_behaviour_log_probs_are_of_the_distribution_sampled_from(engine, folder):
    """After temperature, and of the nucleus only."""
    output = await engine.generate("nucleus", SHORT_PROMPT, Sampling(temperature=0.7, top_p=0.6), 32)
    sequence = np.concatenate([SHORT_PROMPT, output.token_ids])
    logits = reference(folder)(sequence)[0][len(SHORT_PROMPT) - 1 : -1] / 0.7
    for scores, token, logprob in zip(logits, output.token_ids, output.logprobs, strict=True):
        probabilities, order = scores.softmax(-1).sort(descending=True)
        nucleus = int((probabilities.cumsum(0) < 0.6).sum()) + 1
        assert token in order[:nucleus]
        expected = probabilities[order == int(token)] / probabilities[:nucleus].sum()
        assert logprob == pytest.approx(math.log(expected.item()), abs=1e-3)


async def test_a_response_ends_at_a_stop_string_with_the_log_probs_and_experts_of_its_tokens(engine, monkeypatch):
    def text(tokens):
        return "".join(chr(0x4E00 + token) for token in tokens)

    whole = await engine.generate("whole", SHORT_PROMPT, GREEDY, 24)
    string = text(whole.token_ids[8:11].tolist())
    monkeypatch.setattr(engine, "_decode", text)
    sampling = replace(GREEDY, stop=(string,), turn_start=len(SHORT_PROMPT))
    end = next(n for n in range(25) if string in text(whole.token_ids[:n].tolist()))
    for cut in (0, end - 2):  # the string is the call's own, or begins before it
        sent = np.concatenate([SHORT_PROMPT, whole.token_ids[:cut]])
        output = await engine.generate(f"stopped-{cut}", sent, sampling, 24 - cut)
        ended = cut + len(output.token_ids)
        assert (output.finish_reason, ended) == ("stop", end)
        np.testing.assert_array_equal(output.token_ids, whole.token_ids[cut:ended])
        np.testing.assert_array_equal(output.logprobs, whole.logprobs[cut:ended])
        np.testing.assert_array_equal(output.routed_experts, whole.routed_experts[: len(SHORT_PROMPT) + ended - 1])
    again = await engine.generate("after", SHORT_PROMPT, GREEDY, 24)
    np.testing.assert_array_equal(again.token_ids, whole.token_ids)


async def test_invariant_7_the_version_changes_when_all_outputs_before_are_accounted_for(engine):
    from vllm.v1.engine import EngineCoreOutputs

    llm, seen = engine._engine, []
    with mock.patch.object(llm.output_processor, "update_scheduler_stats", seen.append):
        for _ in range(5):
            llm.engine_core.outputs_queue.put_nowait(EngineCoreOutputs())
        await engine._drain_outputs()
        assert len(seen) >= 5


async def test_invariant_7_stamps_are_true_when_weights_come_before_an_answer_is_made_of_arrays(
    engine, trainer, weights, monkeypatch
):
    may_go, output, version = threading.Event(), VllmEngine._output, engine.version

    def late(*arguments):
        may_go.wait(30)
        return output(*arguments)

    monkeypatch.setattr(aside, "_SMALL_BYTES", 0)
    monkeypatch.setattr(VllmEngine, "_output", late)
    call = asyncio.create_task(engine.generate("late", SHORT_PROMPT, RANDOM, 200))
    await until_sampled(engine, 2)
    assert await trainer.push(perturbed(weights)) == version + 1
    assert not call.done(), "the event loop waits for no array"
    may_go.set()
    assert set((await call).versions.tolist()) == {version}


async def test_a_call_that_is_cancelled_leaves_the_engine(engine):
    call = asyncio.create_task(engine.generate("cancelled", SHORT_PROMPT, GREEDY, 200))
    await until_sampled(engine, 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert engine._engine.get_num_unfinished_requests() == 0


async def test_sequences_scored_with_a_resume_have_the_scores_that_they_have_after_it(engine, trainer, weights):
    sequences = [SHORT_PROMPT, *(SHORT_PROMPT[:size] for size in range(2, 6))]
    plain = await engine.score(sequences)
    await engine.pause("abort")
    for a, b in zip(plain, await engine.resume_and_score(sequences), strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        np.testing.assert_array_equal(a.routed_experts, b.routed_experts)
    # Where the resume is refused, they leave the engine without an answer.
    await engine.pause("abort")
    await engine.start_weight_update()
    with pytest.raises(WeightSyncError, match="it was not finished"):
        await engine.resume_and_score(sequences)
    async with asyncio.timeout(60):
        while engine._calls or engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
    await trainer.push(weights)


async def test_every_token_is_in_its_metrics_once(engine):
    from vllm.v1.metrics.stats import IterationStats

    from async_rl.rollout.engine.vllm.stats import RECORDED_AFTER_S

    def counted(name):
        return sum(
            sample.value for family in REGISTRY.collect() for sample in family.samples if sample.name == f"vllm:{name}"
        )

    each_once = {
        "generation_tokens_total": 36,
        "time_to_first_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 33,
        "request_success_total": 3,
        "prompt_tokens_total": 3 * len(SHORT_PROMPT),
        "prefix_cache_queries_total": 3 * len(SHORT_PROMPT),
        "iteration_tokens_total_sum": 36 + 3 * len(SHORT_PROMPT),
    }
    await asyncio.sleep(RECORDED_AFTER_S + 0.5)  # those of earlier tests
    before = {name: counted(name) for name in each_once}
    iterations = counted("iteration_tokens_total_count")
    calls = [engine.generate(f"counted/{tokens}", SHORT_PROMPT, GREEDY, tokens) for tokens in (1, 5, 30)]
    with mock.patch.object(IterationStats, "update_from_output") as counted_by_vllm:
        assert [len(output.token_ids) for output in await asyncio.gather(*calls)] == [1, 5, 30]
    assert not counted_by_vllm.called  # vllm_stats counts in its place
    await asyncio.sleep(RECORDED_AFTER_S + 0.5)
    assert {name: counted(name) - before[name] for name in each_once} == each_once
    # A call of 30 tokens takes 30 iterations, however many are recorded together.
    assert counted("iteration_tokens_total_count") - iterations >= 30
    assert counted("num_requests_running") == 0
