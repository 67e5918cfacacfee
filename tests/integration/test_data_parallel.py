"""A real vLLM engine of two data-parallel ranks, on a CPU: what an engine must do, and that both ranks do it.

Ranks pause together, after up to 16 steps, so that of the conformance tests those with many pauses are left out.
"""

from __future__ import annotations

import asyncio

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from async_rl.weights.canary import make_probe
from async_rl.weights.fingerprint import projection
from tests.integration.engine_conformance import (  # noqa: F401 - pytest finds fixtures and tests by name
    GREEDY,
    RANDOM,
    SHORT_PROMPT,
    ends_unstarted,
    new_after_wait,
    original_weights,
    reference,
    test_a_push_follows_one_whose_sender_died_in_the_middle,
    test_invariant_2_nothing_changes_when_it_is_cut_at_the_stop_token,
    test_invariant_2_nothing_changes_when_it_is_cut_in_the_middle_of_the_prefill,
    test_invariant_7_stamps_are_true_when_calls_are_aborted,
    test_invariant_7_stamps_are_true_when_weights_are_pushed_in_flight,
    test_invariant_10_a_corrupted_push_is_refused_before_it_touches_the_model,
    test_invariant_10_pushed_weights_are_the_ones_in_use,
    test_invariant_10_pushing_the_same_weights_changes_no_bit,
    test_no_prefix_of_earlier_weights_serves_a_later_call,
    test_only_the_missing_rows_are_returned_where_the_others_are_known,
    token_logprobs,
    trainer,
    weights,
)
from tests.support.engine_checkpoint import VOCAB, engine_config, make_checkpoint, perturbed, running

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny_moe"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder):
    # A long prompt takes four steps, so that there is a middle of its prefill.
    async with running(engine_config(folder, data_parallel_size=2, max_num_batched_tokens=64)) as engine:
        calls = (engine.generate(f"0-{i}.0/0/0", SHORT_PROMPT, RANDOM, 24) for i in range(2))
        engine.sampled_first = await asyncio.gather(*calls)
        yield engine


@pytest.fixture
def atol():
    """Experts are computed for the tokens of both ranks at once."""
    return 1e-5


async def test_no_other_host_reaches_a_rank(engine):
    processes = psutil.Process().children(recursive=True)
    found = {port.laddr.ip for each in processes for port in each.net_connections("inet") if port.status == "LISTEN"}
    assert found == {"127.0.0.1"}


async def test_ranks_sample_by_random_numbers_of_their_own(engine):
    first, second = (output.token_ids.tolist() for output in engine.sampled_first)
    assert first[:8] != second[:8]


async def test_calls_of_other_rollouts_are_computed_by_both_ranks_at_once_as_by_the_model(engine, folder):
    prompts = [(SHORT_PROMPT + i) % 100 + 2 for i in range(6)]
    calls = [asyncio.create_task(engine.generate(f"0-{i}.0/0/0", each, GREEDY, 24)) for i, each in enumerate(prompts)]
    await asyncio.sleep(0)
    assert engine._ranks._calls == [3, 3]
    forward = reference(folder)
    for prompt, output in zip(prompts, await asyncio.gather(*calls), strict=True):
        sequence = np.concatenate([prompt, output.token_ids])
        logits, routing = forward(sequence)
        np.testing.assert_allclose(output.logprobs, token_logprobs(logits, sequence)[len(prompt) - 1 :], atol=1e-4)
        np.testing.assert_array_equal(np.sort(output.routed_experts), np.sort(routing[:-1]))


async def test_weights_that_one_rank_did_not_get_are_seen_in_the_scores(engine, trainer, weights, folder, monkeypatch):  # noqa: F811
    core, whole = engine._llm.engine_core, engine._llm.engine_core.call_utility_async

    async def to_the_second(method, *arguments):
        if method == "collective_rpc":
            return await core._call_utility_async(method, *arguments, engine=core.core_engines[1])
        return await whole(method, *arguments)

    changed = perturbed(weights, seed=3)
    # Not the experts, of which each rank has a share that all others compute with.
    pushed = {name: (weights if ".experts." in name else changed)[name] for name in weights}
    monkeypatch.setattr(core, "call_utility_async", to_the_second)
    await trainer.push(pushed)
    monkeypatch.undo()
    forward = reference(folder, pushed)
    probe = make_probe(0, VOCAB)
    off = [
        float(np.abs(score.logprobs - token_logprobs(forward(tokens)[0], tokens)).max())
        for tokens, score in zip(probe, await engine.score(probe), strict=True)
    ]
    assert max(off[1::2]) < 1e-4, off
    assert min(off[::2]) > 1e-2, off


async def test_each_rank_takes_the_fingerprints_of_what_it_scores(engine, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    probe = make_probe(0, VOCAB)
    for tokens, found in zip(probe, await engine.fingerprints(probe), strict=True):
        with torch.no_grad():
            streams = model(torch.from_numpy(tokens)[None].long(), output_hidden_states=True).hidden_states
        # The last is after the final norm there.
        expected = np.stack([stream[0, :-1].numpy() for stream in streams[:-1]]) @ projection(streams[0].shape[-1])
        np.testing.assert_allclose(found[:-1], expected, atol=1e-4)
