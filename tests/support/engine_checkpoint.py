"""A tiny Qwen3-MoE with a dense layer in it, settings of a CPU engine that serves it in float32, and pushes to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.rollout.engine.loader import load_engine
from async_rl.runtime.process import begin_run, mark_semaphores, remove_semaphores

VOCAB = 128
EOS = 1
MAX_RUNNING = 8


def make_checkpoint(path: Path, eos: int | None = EOS, dense: Sequence[int] = (1,), vocab: int = VOCAB) -> Path:
    """A checkpoint in ``path``; ``dense``: its layers without experts; ``vocab``: how many tokens it has."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=list(dense),
        max_position_embeddings=1024,
        eos_token_id=eos,
        initializer_range=0.1,  # wide enough that tokens and experts are not all alike
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(path)
    return path


def engine_config(folder: Path, *, backend: str = "shm", runs: Path = Path("runs"), **rollout) -> RunConfig:
    return validate(
        {
            "runs": str(runs),
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": 256},
            "rollout": {
                "max_response_tokens": 256,
                "max_num_seqs": MAX_RUNNING,
                "kv_cache_bytes": 64 * 2**20,
                "enforce_eager": True,
                **rollout,
            },
            "sync": {"backend": backend},
            "resources": {"device": "cpu"},
        }
    )


@contextlib.asynccontextmanager
async def running(config: RunConfig) -> AsyncIterator[Any]:
    """The engine, started; its process's environment is put back afterwards, and nothing stays in shared memory."""
    from async_rl.weights.vllm.plugin import register

    register()  # which vLLM does where it is the engine
    environment = dict(os.environ)
    begin_run()
    mark_semaphores("engine")
    engine = load_engine(config.rollout.engine)(config, replica=0)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.shutdown()
        await engine.shutdown()  # twice does no harm
        remove_semaphores()
        os.environ.clear()
        os.environ.update(environment)


class Pusher:
    """Pushes tensors as a trainer would: by vLLM's trainer engine, which calls the rollout engine from a thread.

    ``info`` are the trainer engine's settings, those of sync.backend shm by default.
    """

    def __init__(self, engine, weights, info=None):
        self.info = info
        self.engine, self.loop, self.version = engine, asyncio.get_running_loop(), 0
        self.weights, self.sender = weights, None

    async def connect(self):
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from async_rl.weights.vllm.shm import ShmTrainerInitInfo

        pusher = self

        class Source(WeightSource):
            def metadata(self):
                return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in pusher.weights.items()]

            def __iter__(self):
                return iter(pusher.weights.items())

        self.sender = await asyncio.to_thread(
            WeightTransferTrainerFactory.trainer_init,
            self.info or ShmTrainerInitInfo(rank=0),
            client=self,
            source=Source(),
        )

    async def push(self, weights, mode="abort"):
        """A whole sync; the new version."""
        await self.engine.pause(mode)
        await self.send(weights)
        await self.engine.resume()
        return self.version

    async def send(self, weights):
        self.weights = weights
        self.version += 1
        await asyncio.to_thread(self.sender.send_weights)

    def init_weight_transfer_engine(self, info):
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._call(self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))

    def start_weight_update(self):
        self._call(self.engine.start_weight_update())

    def update_weights(self, info):
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._call(self.engine.update_weights(WeightTransferUpdateRequest(update_info=info)))

    def finish_weight_update(self, weight_version=None):
        self._call(self.engine.finish_weight_update())
        self._call(self.engine.update_weight_version(str(self.version)))

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@dataclass
class Scored:
    """What an engine scored, and how long it took."""

    scores: list[Any]
    """With its first weights, then with those of each push."""
    start_s: float
    push_s: float
    """The mean of the pushes."""


def score_after_pushes(config: RunConfig, ids: Sequence[Any], pushes: Sequence[dict[str, torch.Tensor]] = ()) -> Scored:
    """Start an engine, push these weights to it one after the other, and score the sequences before and after each."""

    async def score() -> Scored:
        began = time.monotonic()
        async with running(config) as engine:
            found = Scored([await engine.score(ids)], time.monotonic() - began, 0.0)
            if not pushes:
                return found
            pusher = Pusher(engine, pushes[0])
            await pusher.connect()
            for weights in pushes:
                began = time.monotonic()
                await pusher.push(weights)
                found.push_s += (time.monotonic() - began) / len(pushes)
                found.scores.append(await engine.score(ids))
            pusher.sender.shutdown()
        return found

    return asyncio.run(score())


def perturbed(weights, scale=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in weights.items()}


@contextlib.asynccontextmanager
async def pushing(engine: Any, weights: Any, info: Any = None) -> AsyncIterator[Pusher]:
    """A pusher that is connected to the engine, and disconnected afterwards."""
    pusher = Pusher(engine, weights, info)
    await pusher.connect()
    try:
        yield pusher
    finally:
        pusher.sender.shutdown()


async def until_sampled(engine, count, calls=1, or_done=None):
    """Wait until ``calls`` running calls have sampled ``count`` tokens each."""
    deadline = time.monotonic() + 60
    while sum(sampled >= count for sampled in _sampled(engine)) < calls:
        if or_done is not None and or_done.done():
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def _sampled(engine) -> list[int]:
    """The tokens of each running call."""
    calls = list(engine._calls.values())
    if hasattr(engine, "_sampled"):
        return [engine._sampled(call) or 0 for call in calls]
    return [len(call.answer.token_ids) for call in calls]
