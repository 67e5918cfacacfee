"""What every rollout engine must do, on a tiny MoE, in float32, on a CPU.

``test_vllm_engine.py`` and ``test_sglang_engine.py`` import all of it, and bring the fixtures ``folder`` (the
checkpoint), ``config`` and ``engine``, one for their module. An engine that is not as ``atol``, ``ends_unstarted`` or
``new_after_wait`` below say has fixtures of its own for them.
"""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import pytest_asyncio
import torch

from async_rl.errors import EngineError, WeightSyncError
from async_rl.models.config import read_model_config
from async_rl.rollout.engine.interface import RolloutEngine, Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.weights.canary import make_probe
from tests.support.engine_checkpoint import EOS, MAX_RUNNING, VOCAB, perturbed, pushing, until_sampled

GREEDY = Sampling(temperature=1.0, top_p=1.0, greedy=True)
RANDOM = Sampling(temperature=1.0, top_p=1.0)
# vLLM caches prefixes in blocks of 128 tokens on CPU, so a prompt shares something only when it is longer.
LONG_PROMPT = np.random.default_rng(0).integers(2, VOCAB, 200).astype(np.int32)
SHORT_PROMPT = LONG_PROMPT[:17]


@pytest.fixture
def atol():
    """Return by how much a log-prob may differ because a token was computed beside others."""
    return 0.0


@pytest.fixture
def ends_unstarted():
    """Return whether a pause that keeps calls may end one that it meets before its first token."""
    return False


@pytest.fixture
def new_after_wait():
    """Return how many calls at least the next version computes, if 4 begin while a pause waits for 16 on 8 places."""
    return 8


@pytest.fixture(scope="module")
def weights(folder):
    """The checkpoint's tensors, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(engine, weights):
    async with pushing(engine, weights) as trainer:
        yield trainer


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def original_weights(engine, trainer, weights):
    """Each test ends with the checkpoint's weights in the engine, and with the engine running."""
    yield
    await trainer.push(weights)


def reference(folder, weights=None):
    """(logits [N, V], routing [N, L, K]) by transformers, as a function of a sequence. In float64, and without its
    grouped experts kernel, which on CPU has been seen to be off by 1e-4 now and then."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if weights is not None:
        import shutil
        import tempfile

        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as other:
            shutil.copy(folder / "config.json", other)
            save_file(weights, Path(other) / "model.safetensors", metadata={"format": "pt"})
            model = AutoModelForCausalLM.from_pretrained(other, **options).eval()

    @torch.no_grad()
    def forward(sequence):
        out = model(torch.as_tensor(np.asarray(sequence)[None].astype(np.int64)), output_router_logits=True)
        routing = torch.stack([logits.topk(2, dim=-1).indices for logits in out.router_logits], dim=1)
        return out.logits[0], routing.numpy()

    return forward


def token_logprobs(logits, sequence):
    scores = logits.log_softmax(-1)[:-1]
    return scores.gather(1, torch.as_tensor(np.asarray(sequence)[1:, None].astype(np.int64)))[:, 0].numpy()


async def rollout(engine, cuts, prompt=SHORT_PROMPT, limit=48, policy="replace"):
    """One greedy response, aborted and resumed whenever it has sampled as many more tokens as ``cuts`` says."""
    partial = PartialRollout.begin(
        f"r{cuts}",
        prompt,
        max_response_tokens=limit,
        eos_token_id=EOS,
        routing_spec=engine.routing_spec,
        routing_policy=policy,
    )
    for cut in [*cuts, None]:
        if partial.finished:
            break
        tokens, budget, first_row = partial.next_request()
        request = f"{partial.trajectory_id}/{cut}"
        call = asyncio.create_task(engine.generate(request, tokens, GREEDY, budget, first_row))
        if cut is not None:
            await until_sampled(engine, cut, or_done=call)
            await engine.pause("abort")
            await engine.resume()
        partial = partial.absorb(await call)
    return partial.to_trajectory()


async def test_it_is_a_rollout_engine(engine, folder):
    assert isinstance(engine, RolloutEngine)
    assert engine.routing_spec == read_model_config(folder).routing_spec


def assert_same(resumed, whole, atol):
    """Bit for bit but for ``atol``, the routing of every segment included."""
    np.testing.assert_array_equal(resumed.response_ids, whole.response_ids)
    np.testing.assert_allclose(resumed.logprobs, whole.logprobs, rtol=0, atol=atol)
    np.testing.assert_array_equal(resumed.routed_experts, whole.routed_experts)
    assert resumed.finish_reason == whole.finish_reason
    for segment in resumed.segments:
        if segment.routed_experts is not None:
            rows = len(resumed.prompt_ids) + segment.stop - 1
            np.testing.assert_array_equal(segment.routed_experts, whole.routed_experts[:rows])


async def cut_after(engine, cut, policy):
    """One greedy response whose first call ends after exactly ``cut`` tokens, and is then treated as interrupted."""
    partial = PartialRollout.begin(
        f"c{cut}",
        SHORT_PROMPT,
        max_response_tokens=48,
        eos_token_id=EOS,
        routing_spec=engine.routing_spec,
        routing_policy=policy,
    )
    tokens, _, first_row = partial.next_request()
    first = await engine.generate(f"c{cut}/0", tokens, GREEDY, cut, first_row)
    partial = partial.absorb(replace(first, finish_reason="abort"))
    tokens, budget, first_row = partial.next_request()
    return partial.absorb(await engine.generate(f"c{cut}/1", tokens, GREEDY, budget, first_row)).to_trajectory()


@pytest.mark.parametrize("policy", ["replace", "preserve", "exact"])
async def test_invariant_2_nothing_changes_when_nothing_changes_at_every_cut(engine, policy, atol):
    whole = await rollout(engine, ())
    for resumed in await asyncio.gather(*(cut_after(engine, cut, policy) for cut in range(1, 48))):
        assert resumed.is_partial
        assert_same(resumed, whole, atol)


@pytest.mark.parametrize(
    ("policy", "every"),
    [
        ("replace", 6),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("replace", "preserve", "exact")),
    ],
)
async def test_invariant_2_nothing_changes_when_nothing_changes_and_it_is_aborted(engine, policy, every, atol):
    """For real, under the same weights: before the first token, while it runs, at the limit."""
    whole = await rollout(engine, ())
    assert (len(whole.response_ids), whole.finish_reason) == (48, "length")
    cut_at = set()
    for cut in range(0, 49, every):
        resumed = await rollout(engine, (cut,), policy=policy)
        assert_same(resumed, whole, atol)
        cut_at.update(resumed.resume_points)
    # The engine runs on until the pause reaches it, so a cut may fall some tokens later than it was aimed at.
    assert len(cut_at) > 16 // every
    whole = await rollout(engine, (), limit=200)  # so that no pause comes too late, on a busy machine either
    for cuts in [(1, 1, 1), (0, 10, 0, 10), (5, 5, 5, 5, 5)]:
        resumed = await rollout(engine, cuts, limit=200, policy=policy)
        assert resumed.is_partial
        assert_same(resumed, whole, atol)


async def test_invariant_2_nothing_changes_when_it_is_cut_at_the_stop_token(engine, trainer, weights, atol):
    tokens = (await rollout(engine, ())).response_ids.tolist()
    # A token that comes for the first time after some others: from now on the stop token is a little likelier.
    last = max(tokens.index(token) for token in set(tokens))
    assert last >= 3, "the greedy response repeats itself from the start: choose another prompt"
    head = weights["lm_head.weight"].clone()
    head[EOS] = head[tokens[last]] * 1.01
    await trainer.push({**weights, "lm_head.weight": head})
    whole = await rollout(engine, ())
    count = len(whole.response_ids)
    assert (whole.response_ids[-1], whole.finish_reason) == (EOS, "stop")
    assert count >= 3, "cut at the stop token only means nothing without tokens before it"
    for policy in ("replace", "preserve", "exact"):
        for cut in [*range(count + 1)] * 2:
            assert_same(await rollout(engine, (cut,), policy=policy), whole, atol)


async def test_invariant_2_nothing_changes_when_it_is_cut_in_the_middle_of_the_prefill(engine, atol):
    """The prompt takes several engine steps, and the pauses fall at all times of them."""
    whole = await rollout(engine, (), LONG_PROMPT, limit=8)
    without_a_token = 0
    for attempt in range(30):
        # Another first token each time, so that no cached prefix makes the prefill short.
        prompt = np.concatenate([[2 + attempt], LONG_PROMPT[1:]]).astype(np.int32)
        call = asyncio.create_task(engine.generate(f"m{attempt}", prompt, GREEDY, 8))
        await asyncio.sleep(attempt * 2e-4)
        await engine.pause("abort")
        await engine.resume()
        first = await call
        if not len(first.token_ids):
            without_a_token += 1
            again = await engine.generate(f"m{attempt}/1", prompt, GREEDY, 8)
            other = await rollout(engine, (), prompt, limit=8)
            np.testing.assert_array_equal(again.token_ids, other.response_ids)
            np.testing.assert_allclose(again.logprobs, other.logprobs, rtol=0, atol=atol)
            np.testing.assert_array_equal(again.routed_experts, other.routed_experts)
    assert without_a_token >= 3
    assert_same(await rollout(engine, (0, 0, 2), LONG_PROMPT, limit=8), whole, atol)


async def test_only_the_missing_rows_are_returned_where_the_others_are_known(engine, atol):
    whole = await rollout(engine, ())

    async def continued(cut):
        tokens = np.concatenate([SHORT_PROMPT, whole.response_ids[:cut]])
        return cut, await engine.generate(f"cut{cut}", tokens, GREEDY, 48 - cut, len(tokens) - 1)

    for cut, output in await asyncio.gather(*(continued(cut) for cut in range(1, 48))):
        np.testing.assert_array_equal(output.token_ids, whole.response_ids[cut:])
        np.testing.assert_allclose(output.logprobs, whole.logprobs[cut:], rtol=0, atol=atol)
        np.testing.assert_array_equal(output.routed_experts, whole.routed_experts[len(SHORT_PROMPT) + cut - 1 :])


async def test_routing_and_log_probs_are_those_of_the_model(engine, folder):
    response = await rollout(engine, ())
    sequence = np.concatenate([response.prompt_ids, response.response_ids])
    logits, routing = reference(folder)(sequence)
    np.testing.assert_allclose(response.logprobs, token_logprobs(logits, sequence)[-48:], atol=1e-4)
    np.testing.assert_array_equal(np.sort(response.routed_experts), np.sort(routing[:-1]))


async def test_a_response_ends_at_the_stop_token(engine, trainer, weights):
    """Weights under which the stop token is certain: an output layer that answers to a final norm of ones only."""
    await trainer.push(certain(weights, EOS))
    output = await engine.generate("stop", SHORT_PROMPT, GREEDY, 10)
    assert (output.token_ids.tolist(), output.finish_reason) == ([EOS], "stop")


async def test_score_agrees_with_transformers(engine, folder):
    probe = [*make_probe(0, VOCAB), LONG_PROMPT]
    forward = reference(folder)
    for sequence, score in zip(probe, await engine.score(probe), strict=True):
        logits, routing = forward(sequence)
        np.testing.assert_allclose(score.logprobs, token_logprobs(logits, sequence), atol=1e-4)
        np.testing.assert_array_equal(np.sort(score.routed_experts), np.sort(routing[:-1]))


async def scored_alone(engine, probe):
    """Score one sequence after the other: which are computed together, and so the last bit, depends on the moment."""
    return [score for sequence in probe for score in await engine.score([sequence])]


async def test_invariant_10_pushing_the_same_weights_changes_no_bit(engine, trainer, weights):
    probe = make_probe(0, VOCAB)
    before = await scored_alone(engine, probe)
    for _ in range(3):
        version = await trainer.push(weights)
        assert engine.version == version
        for a, b in zip(before, await scored_alone(engine, probe), strict=True):
            np.testing.assert_array_equal(a.logprobs, b.logprobs)
            np.testing.assert_array_equal(a.routed_experts, b.routed_experts)


async def test_invariant_10_pushed_weights_are_the_ones_in_use(engine, trainer, weights, folder):
    probe = make_probe(1, VOCAB)
    before = await engine.score(probe)
    await trainer.push(perturbed(weights))
    forward = reference(folder, perturbed(weights))
    for sequence, old, new in zip(probe, before, await engine.score(probe), strict=True):
        assert np.abs(old.logprobs - new.logprobs).max() > 0.1
        np.testing.assert_allclose(new.logprobs, token_logprobs(forward(sequence)[0], sequence), atol=1e-4)


async def test_invariant_10_a_corrupted_push_is_refused_before_it_touches_the_model(engine, trainer, weights):
    probe = make_probe(0, VOCAB)
    before, version = await scored_alone(engine, probe), engine.version
    await engine.pause("abort")
    write = trainer.sender._file.write

    def write_and_corrupt(tensors):
        announced = write(tensors)
        os.pwrite(announced.fd, b"\x7f\x7f", announced.nbytes // 2)
        return announced

    with (
        mock.patch.object(trainer.sender._file, "write", write_and_corrupt),
        pytest.raises(WeightSyncError, match=r"replica 0: .*does not match its checksum"),
    ):
        await trainer.send(perturbed(weights))
    assert engine.version == version
    with pytest.raises(WeightSyncError, match="the last weight sync failed"):
        await engine.resume()
    # The weights are as before, and a good push makes the engine whole.
    await trainer.send(weights)
    await engine.resume()
    for a, b in zip(before, await scored_alone(engine, probe), strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


async def test_a_push_needs_a_paused_engine(engine):
    with pytest.raises(WeightSyncError, match="pause the engine before a weight sync"):
        await engine.start_weight_update()
    with pytest.raises(WeightSyncError, match="was not paused"):
        await engine.update_weight_version("7")


async def test_invariant_7_stamps_are_true_when_weights_are_pushed_in_flight(engine, trainer, weights, ends_unstarted):
    """Half of the pushes are of weights that are certain of each token, so every log-prob tells who sampled it."""
    is_certain = {engine.version: False}
    calls = [
        asyncio.create_task(engine.generate(f"f{i}", np.append(SHORT_PROMPT, i).astype(np.int32), RANDOM, 200))
        for i in range(3 * MAX_RUNNING)
    ]
    for k in range(8):
        await until_sampled(engine, 4 * (k + 1))
        version = await trainer.push(weights if k % 2 else certain(weights, token=7), mode="keep")
        is_certain[version] = k % 2 == 0
    outputs = await asyncio.gather(*calls)
    ended_early = [o for o in outputs if o.finish_reason not in ("stop", "length")]
    assert not ended_early or ends_unstarted
    assert all((o.finish_reason, len(set(o.versions.tolist()))) == ("abort", 1) for o in ended_early)
    assert max(len(set(o.versions.tolist())) for o in outputs) >= 4
    for output in outputs:
        assert (np.diff(output.versions) >= 0).all()
        expected = np.array([is_certain[v] for v in output.versions.tolist()])
        np.testing.assert_array_equal(output.logprobs > math.log(0.9), expected)
        assert output.routed_experts.shape[0] == len(SHORT_PROMPT) + 1 + len(output.token_ids) - 1


async def test_invariant_7_stamps_are_true_when_calls_are_aborted(engine, trainer, weights):
    version = engine.version
    calls = [asyncio.create_task(engine.generate(f"s{i}", SHORT_PROMPT, RANDOM, 200)) for i in range(MAX_RUNNING)]
    await until_sampled(engine, 2)
    await engine.pause("abort")
    during = asyncio.create_task(engine.generate("during", SHORT_PROMPT, RANDOM, 8))
    await trainer.send(perturbed(weights))
    await engine.resume()
    for output in await asyncio.gather(*calls):
        assert set(output.versions.tolist()) <= {version}
    assert set((await during).versions.tolist()) == {version + 1}


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
async def test_no_prefix_of_earlier_weights_serves_a_later_call(engine, trainer, weights, folder, mode, new_after_wait):
    """Calls that share a long prompt: some run at the push, some wait for a place, some come after it."""
    limit = 40 if mode == "wait" else 200
    version = engine.version
    early = [asyncio.create_task(engine.generate(f"e{i}", LONG_PROMPT, RANDOM, limit)) for i in range(2 * MAX_RUNNING)]
    await until_sampled(engine, 3, calls=MAX_RUNNING)
    pushed = perturbed(weights)
    await trainer.push(pushed, mode)
    late = [asyncio.create_task(engine.generate(f"l{i}", LONG_PROMPT, RANDOM, 12)) for i in range(4)]
    outputs = [o for o in await asyncio.gather(*early, *late) if (o.versions == version + 1).all() and len(o.token_ids)]
    assert len(outputs) >= {"abort": 4, "keep": 8, "wait": new_after_wait}[mode]
    forward = reference(folder, pushed)
    for output in outputs:
        sequence = np.concatenate([LONG_PROMPT, output.token_ids])
        expected = token_logprobs(forward(sequence)[0], sequence)[len(LONG_PROMPT) - 1 :]
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)


async def test_aborted_before_the_first_token(engine):
    calls = [asyncio.create_task(engine.generate(f"w{i}", SHORT_PROMPT, GREEDY, 100)) for i in range(2 * MAX_RUNNING)]
    await until_sampled(engine, 1)
    await engine.pause("abort")
    outputs = await asyncio.gather(*calls)
    await engine.resume()
    empty = [o for o in outputs if not len(o.token_ids)]
    assert len(empty) >= MAX_RUNNING
    for output in empty:
        assert output.finish_reason == "abort"
        assert output.routed_experts is None
        assert len(output.logprobs) == len(output.versions) == 0


async def test_score_refuses_a_paused_engine(engine):
    await engine.pause("keep")
    with pytest.raises(EngineError, match="score: the engine is paused"):
        await engine.score([SHORT_PROMPT])
    await engine.resume()


async def test_a_push_that_was_begun_and_not_finished_keeps_the_engine_paused(engine, trainer, weights):
    await engine.pause("abort")
    await engine.start_weight_update()
    with pytest.raises(WeightSyncError, match="it was not finished"):
        await engine.resume()
    with pytest.raises(WeightSyncError, match="finished, but no weights were received"):
        await engine.finish_weight_update()
    announced = trainer.sender._file.write(weights.items())
    trainer.version += 1
    await asyncio.to_thread(trainer.update_weights, asdict(announced))
    await asyncio.to_thread(trainer.finish_weight_update)
    await engine.resume()


async def test_a_push_follows_one_whose_sender_died_in_the_middle(engine, trainer, weights):
    """At whichever point it died: vLLM refuses a new update while one is active."""
    (good,) = await engine.score([SHORT_PROMPT])
    for died_after_the_transfer in (False, True):
        await engine.pause("abort")
        await engine.start_weight_update()
        if died_after_the_transfer:
            announced = trainer.sender._file.write(perturbed(weights).items())
            await asyncio.to_thread(trainer.update_weights, asdict(announced))
        with pytest.raises(WeightSyncError, match="it was not finished"):
            await engine.resume()
        before = engine.version
        assert await trainer.push(weights) == engine.version > before
        (score,) = await engine.score([SHORT_PROMPT])
        np.testing.assert_array_equal(score.logprobs, good.logprobs)


async def test_it_says_what_it_had_cached_and_what_it_has_to_do(engine):
    """Rollouts of agents begin by it."""
    prompt = np.random.default_rng(11).integers(2, VOCAB, 300).astype(np.int32)
    first = await engine.generate("first", prompt, GREEDY, 4)
    again = await engine.generate("again", np.concatenate([prompt, first.token_ids]), GREEDY, 4)
    assert first.cached_tokens == 0
    assert 256 <= again.cached_tokens <= 303, "whole blocks"
    calls = [asyncio.create_task(engine.generate(f"c{i}", prompt, RANDOM, 100)) for i in range(3 * MAX_RUNNING)]
    seen = []
    while not all(call.done() for call in calls):
        seen.append(await engine.load())
        await asyncio.sleep(0.01)
    await asyncio.gather(*calls)
    assert max(load.waiting for load in seen) >= MAX_RUNNING
    assert 0 < max(load.kv_use for load in seen) <= 1
    assert seen[0].kv_tokens >= 1000


async def test_a_request_that_cannot_be_is_refused(engine):
    with pytest.raises(EngineError, match="replica 0: too-long"):
        await engine.generate("too-long", np.zeros(600, np.int32), GREEDY, 1)


async def test_a_name_table_unlike_the_checkpoint_is_refused(engine, weights):
    layers = sum(name.endswith("experts.3.up_proj.weight") for name in weights)
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    table = [[name, "float32", list(t.shape)] for name, t in weights.items() if "experts.3.up_proj" not in name]
    with pytest.raises(
        WeightSyncError, match=rf"lacks {layers} tensors, first model\.layers\.0\.mlp\.experts\.3\.up_proj"
    ):
        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"table": table}))


def certain(weights, token):
    """Weights under which ``token`` is all but certain: the final norm keeps one direction that only it reads."""
    norm = torch.zeros_like(weights["model.norm.weight"])
    norm[0] = 1.0
    embed = weights["model.embed_tokens.weight"].clone()
    embed[:, 0] = 100.0
    head = torch.zeros_like(weights["lm_head.weight"])
    head[token, 0] = 10.0
    return {**weights, "model.norm.weight": norm, "model.embed_tokens.weight": embed, "lm_head.weight": head}
