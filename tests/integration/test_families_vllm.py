"""The trainer's exports load in vLLM, which computes the log-probs and the routing that transformers does.

Real engines on the CPU, float32, one after another. Latent attention runs there as ordinary attention
(VLLM_MLA_DISABLE), because its own kernels take bfloat16 alone. Moonlight is left out: this CPU engine computes its
plain rotary embeddings in another way.
"""

import asyncio

import numpy as np
import pytest

from tests.integration.test_families import export
from tests.support import model_families
from tests.support.engine_checkpoint import engine_config, running
from tests.support.model_families import DENSE, VOCAB
from tests.support.ranks import run_config

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow]


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral", "DeepSeek-V3", "GLM-4 MoE"])
def test_an_export_computes_the_same_in_vllm(ranks, tmp_path, monkeypatch, name):
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 33)]
    ranks.call(model_families.make, name, tmp_path / "model")
    expected = ranks.call(model_families.reference, tmp_path / "model", ids)
    sizes = {"trainer__parallel__tp": 2, "trainer__parallel__pp": 2}
    if name not in DENSE:
        sizes["trainer__parallel__ep"] = 2
    ranks.run(export, run_config(tmp_path / "model", **sizes), tmp_path / "out")

    async def score():
        async with running(engine_config(tmp_path / "out")) as engine:
            return await engine.score(ids)

    for found, logprobs, routing in zip(asyncio.run(score()), expected.logprobs, expected.routing, strict=True):
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-5)
        if name not in DENSE:
            assert (np.sort(found.routed_experts, -1) == np.sort(routing, -1)).all(-1).mean() > 0.98
