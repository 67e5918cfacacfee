"""A real engine of two tensor-parallel ranks, on a CPU: what it samples, what it scores, and three pushes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from async_rl.weights.canary import make_probe
from tests.integration.engine_conformance import GREEDY, SHORT_PROMPT, reference, token_logprobs
from tests.integration.test_sglang_broadcast import init_info
from tests.support import nccl
from tests.support.engine_checkpoint import VOCAB, Pusher, engine_config, make_checkpoint, perturbed, running
from tests.support.needs import NEEDS_SGLANG
from tests.support.processes import shared_files

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio]


@pytest.mark.parametrize(
    ("engine", "backend"),
    [
        ("vllm", "shm"),
        pytest.param("sglang", "shm", marks=NEEDS_SGLANG),
        pytest.param("sglang", "nccl", marks=NEEDS_SGLANG),
    ],
)
async def test_two_ranks_compute_what_the_model_computes_after_each_push(engine, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # for NCCL's part, see test_sglang_broadcast.py
    folder = make_checkpoint(tmp_path / "model", dense=())
    weights = load_file(folder / "model.safetensors")
    config = engine_config(folder, runs=tmp_path / "runs", engine=engine, tensor_parallel_size=2)
    # Refused by the settings, for NCCL needs GPUs.
    config = config.model_copy(update={"sync": config.sync.model_copy(update={"backend": backend})})
    before = shared_files()
    async with running(config) as subject:
        with nccl.streams_on_cpu() if backend == "nccl" else contextlib.nullcontext():
            await check(subject, folder, weights, None if backend == "shm" else init_info(0, 60.0, world_size=3))
        # Through which rank 0 sends the other what to do; a kill leaves it.
        assert any(Path("/dev/shm", name).stat().st_size > 2**20 for name in shared_files() - before)
    assert shared_files() - before == set()


async def check(engine, folder, weights, info):
    trainer = Pusher(engine, weights, info)
    await trainer.connect()
    for seed in range(4):
        pushed = weights if seed == 0 else perturbed(weights, seed=seed)
        if seed:
            await trainer.push(pushed)
        forward = reference(folder, pushed)
        output = await engine.generate(f"sampled-{seed}", SHORT_PROMPT, GREEDY, 24)
        sequence = np.concatenate([SHORT_PROMPT, output.token_ids])
        logits, routing = forward(sequence)
        expected = token_logprobs(logits, sequence)[len(SHORT_PROMPT) - 1 :]
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)
        np.testing.assert_array_equal(np.sort(output.routed_experts), np.sort(routing[:-1]))
        assert set(output.versions.tolist()) == {seed}
        for probe, score in zip(make_probe(seed, VOCAB), await engine.score(make_probe(seed, VOCAB)), strict=True):
            np.testing.assert_allclose(score.logprobs, token_logprobs(forward(probe)[0], probe), atol=1e-4)
    trainer.sender.shutdown()
