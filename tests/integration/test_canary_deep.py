"""The canary between a real engine and a real trainer on a model of 30 thin layers, in float32 and in bfloat16, and
with an engine in fp8.

`pytest -s` prints what docs/evidence/routing-replay.md quotes.
"""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from async_rl.errors import WeightSyncMismatch
from async_rl.models.config import read_model_config
from async_rl.rollout.actor import RolloutReplica
from async_rl.weights.sync import WeightSync
from tests.integration.test_oracle import TrainerSide, layer_tensors
from tests.support import trainer_process
from tests.support.engine_checkpoint import Pusher, engine_config, running

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow]

LAYERS, HIDDEN, VOCAB = 30, 64, 512
PROMPTS = [np.arange(i, i + 40, dtype=np.int32) for i in range(4)]


def make(folder):
    """A checkpoint whose layers all matter and whose log-probs of random tokens are about -20, as in real models."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.normal_(0.0, 1.0 if "embed" in name else tensor.shape[1] ** -0.5)
        model.lm_head.weight *= 6.0
    model.save_pretrained(folder)
    return folder


def updated(base, folder, size):
    """A checkpoint whose tensors differ from those of ``base`` by ``size`` of their scale. Returns the tensors."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor + size * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(base / name, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-3), ("bfloat16", 0.5), ("fp8", 0.5)])
async def test_a_deep_model_trains_and_a_stale_layer_of_it_is_caught(tmp_path, dtype, size):
    base = make(tmp_path / "base")
    fp8, dtype = dtype == "fp8", "bfloat16" if dtype == "fp8" else dtype
    config = engine_config(base, dtype=dtype, quantization="fp8_per_channel" if fp8 else None)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    kind, settings = getattr(torch, dtype), {"dtype": dtype, "router_replay": "off"}
    old = {name: tensor.to(kind) for name, tensor in updated(base, tmp_path / "same", 0.0).items()}
    new = {name: tensor.to(kind) for name, tensor in updated(base, tmp_path / "new", size).items()}

    async with running(config) as engine:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:

            def trainer(function, *arguments, **keywords):
                return asyncio.wrap_future(pool.submit(function, *arguments, **keywords))

            pusher = Pusher(engine, old)
            await pusher.connect()
            side = TrainerSide(trainer, pusher, new)
            sync = WeightSync(config, read_model_config(base), side, PROMPTS)
            sync.members = {0: RolloutReplica(config, 0, None, engine, None, None)}
            await trainer(trainer_process.open_trainer, base, **settings)
            await sync.begin()
            print(f"\n  {sync.canary.noise}")
            await trainer(trainer_process.open_trainer, tmp_path / "new", **settings)
            record = await sync.run(1)
            print(f"  after an update of {size:g}: {record.canary:.2g}")
            assert not record.retries
            stale = TrainerSide(trainer, pusher, {**new, **layer_tensors(old, 15, "")})
            stale_sync = WeightSync(config, read_model_config(base), stale, PROMPTS)
            stale_sync.members, stale_sync.canary.noise = sync.members, sync.canary.noise
            with pytest.raises(WeightSyncMismatch, match="differs most in layer 15") as caught:
                await stale_sync.run(2)
            print(f"  layer 15 as it was before: {caught.value}")
            pusher.sender.shutdown()
