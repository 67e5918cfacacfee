"""Weights of any size, and the two ends that bring them from host to host with sync.backend object_store.

Both ends are those of a run: ``WeightSender`` of the trainer's rank 0, and the rollout worker's part that receives
weights. Around them are plain tensors, and an engine that reads what it is given. Knows Ray, not how hosts are made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from async_rl.config.loading import validate
from async_rl.models.names import Meta
from async_rl.rollout.actor import RolloutActor
from async_rl.rollout.parts import EngineParts
from async_rl.weights.shm_file import Announcement, TensorMeta, read

# A tensor of each layer of an 8B model's attention, in bfloat16.
TENSOR_BYTES = 32 * 2**20
TIMEOUT_S = 1200.0


class PlainWeights:
    """Tensors of ``nbytes`` in all, as ``trainer.export.Weights`` yields them.

    Each round has other values, in one element of ``changed_every``.
    """

    def __init__(self, nbytes: int, changed_every: int = 1) -> None:
        self._changed_every = changed_every
        count = max(1, nbytes // TENSOR_BYTES)
        self._tensors = {f"layer.{i}": torch.empty(nbytes // count // 2, dtype=torch.bfloat16) for i in range(count)}
        self.round = 0

    def metadata(self) -> list[Meta]:
        return [Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def change(self) -> None:
        """Do what an optimizer's update does: every tensor has other values."""
        self.round += 1
        for tensor in self._tensors.values():
            tensor[:: self._changed_every] = self.round % 250

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors.items())


class Sender:
    """Rank 0 of the trainer, as ``TrainerWorker`` has it."""

    def __init__(self, nbytes: int, changed_every: int = 1) -> None:
        """Send what has changed, after the first time, unless everything does."""
        from async_rl.weights.vllm.sender import WeightSender
        from async_rl.weights.vllm.source import StreamedSource

        self._weights = PlainWeights(nbytes, changed_every)
        delta = {"full_every": 1 if changed_every == 1 else 10**6}
        sync = {"backend": "object_store", "timeout_s": TIMEOUT_S, "delta": delta}
        config = validate({"model": {"path": "m"}, "data": {"train": "t"}, "sync": sync})
        self._sender = WeightSender(config, 0, source=StreamedSource(self._weights), host=lambda: "127.0.0.1")
        publisher = self._sender._publisher
        assert publisher is not None
        self._publish, publisher.publish = publisher.publish, self._timed  # type: ignore[method-assign]
        self._publish_s = 0.0

    def connect(self, receivers: Sequence[Any]) -> None:
        self._sender.connect(receivers)

    def stage(self) -> tuple[float, float]:
        """Change the weights and stage them. Returns the seconds of that, and those until the store had them."""
        self._weights.change()
        self._sender.outdate()
        began = time.monotonic()
        self._sender.stage()
        return time.monotonic() - began, self._publish_s

    def _timed(self, tensors: Any, *, full: bool = False) -> Any:
        began = time.monotonic()
        publication = self._publish(tensors, full=full)
        self._publish_s = time.monotonic() - began
        return publication


class Engine:
    """What a rollout worker calls; it loads weights by reading them."""

    def __init__(self) -> None:
        self._table: list[TensorMeta] = []

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self._table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in request.init_info["table"]]

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request: Any) -> None:
        await asyncio.to_thread(read, Announcement(**request.update_info), self._table)

    async def finish_weight_update(self) -> None: ...

    async def update_weight_version(self, version: str) -> None: ...


class Receiver(RolloutActor):
    """A rollout worker of which only the part that receives weights is there."""

    def __init__(self) -> None:
        self._pending_engine_call = None
        self._parts, self._hosts = EngineParts(None, []), []
        self._engine = Engine()
