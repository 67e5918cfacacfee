"""vLLM's engine in fp8: what is pushed to it is what an engine that starts with these weights has, bit for bit.

Real engines on the CPU, one after another: products of linear layers in fp8, keys and values where the processor has a
kernel for them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from async_rl.models.config import read_model_config
from async_rl.rollout.engine.vllm import process
from tests.support import model_families
from tests.support.engine_checkpoint import engine_config, score_after_pushes
from tests.support.model_families import DENSE, VOCAB

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WEIGHTS = {"quantization": "fp8_per_channel"}
CACHE = {"kv_cache_dtype": "fp8"}
CASES = [("Qwen3", WEIGHTS), ("Qwen3-MoE", WEIGHTS), ("Llama", CACHE), ("Mixtral", WEIGHTS | CACHE)]
PUSHES = 3


def settings(folder, runs, **rollout):
    return engine_config(folder, runs=runs, dtype="bfloat16", **rollout)


def furthest(found, expected):
    return max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "rollout"), CASES, ids=[f"{name}-{'-'.join(rollout)}" for name, rollout in CASES])
def test_each_push_is_converted_as_weights_are_at_the_start(tmp_path, name, rollout):
    if "kv_cache_dtype" in rollout and not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512")
    ids = [np.random.default_rng(5).integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 33)]
    base = model_families.make(name, tmp_path / "model", tied=False)
    folders = [tmp_path / f"pushed{push}" for push in range(PUSHES)]
    pushes = [
        {key: tensor.bfloat16() for key, tensor in model_families.changed(base, folder, push).items()}
        for push, folder in enumerate(folders)
    ]
    runs = tmp_path / "runs"
    first, *after = score_after_pushes(settings(base, runs, **rollout), ids, pushes).scores
    assert all(furthest(a, b) > 0.1 for a, b in zip([first, *after], after, strict=False)), "a push changes something"
    for folder, pushed in ((folders[0], after[0]), (folders[-1], after[-1])):
        (started,) = score_after_pushes(settings(folder, runs, **rollout), ids).scores
        for a, b in zip(pushed, started, strict=True):
            np.testing.assert_array_equal(a.logprobs, b.logprobs)
            if name not in DENSE:
                np.testing.assert_array_equal(a.routed_experts, b.routed_experts)
    (plain,) = score_after_pushes(settings(folders[-1], runs), ids).scores
    assert 0.05 < furthest(started, plain) < 2.0, "fp8 is what is computed"


def test_routers_are_left_as_they_are(tmp_path):
    """By the names that vLLM's models give their layers."""
    config = settings(model_families.make("Qwen3-MoE", tmp_path / "model"), tmp_path / "runs", **WEIGHTS)
    arguments = process.engine_args(config, 0, read_model_config(tmp_path / "model"))
    assert arguments.quantization == "online"
    subject = OnlineQuantizationConfig(arguments.quantization_config)
    assert isinstance(arguments.quantization_config, QuantizationConfigArgs)
    layer = object.__new__(LinearBase)
    converted = {
        name: subject.resolve_quant_method_cls(layer, f"model.layers.0.{name}") is not None
        for name in ("mlp.gate", "block_sparse_moe.gate", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj")
    }
    assert converted == {
        "mlp.gate": False,
        "block_sparse_moe.gate": False,
        "mlp.gate_up_proj": True,
        "mlp.down_proj": True,
        "self_attn.qkv_proj": True,
    }
