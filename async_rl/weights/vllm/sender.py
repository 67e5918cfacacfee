"""The trainer's end of a weight transfer: vLLM's transfer backend, and the client that reaches the rollout actors.

Runs on every trainer rank; rank 0 sends. Imports vLLM, so only trainer processes import this module.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import ray
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from async_rl.config.schema import RunConfig
from async_rl.weights.vllm.plugin import register
from async_rl.weights.vllm.shm import ShmTrainerInitInfo, ShmTrainerWeightTransferEngine


class VersionedSyncClient(RayVLLMWeightSyncClient):  # type: ignore[misc]
    """vLLM's client for Ray actors, which also names the policy version when an update is finished.

    vLLM's trainer engines finish an update without a version (``send_weights`` takes no argument), so the version of
    the transfer in progress is kept here.
    """

    def __init__(self, rollout_workers: Sequence[Any]) -> None:
        super().__init__(list(rollout_workers))
        self.all_handles = list(rollout_workers)
        self.version = 0

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        super().finish_weight_update(weight_version or str(self.version))


class WeightSender:
    """Transfers ``source`` to the rollout actors at each ``send``; every trainer rank has one and calls it in step."""

    def __init__(self, config: RunConfig, rank: int, *, source: WeightSource, rollout_workers: Sequence[Any]) -> None:
        register()
        self._client = VersionedSyncClient(rollout_workers)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(config, rank), client=self._client, source=source
        )

    def stage(self) -> dict[str, Any] | None:
        """Do what of the next ``send`` needs no engine, so that engines generate meanwhile.

        Returns the update that each engine can take by itself; None if it needs ``send``, and on ranks that do not
        send.
        """
        if isinstance(self._engine, ShmTrainerWeightTransferEngine):  # NCCL sends from the GPU's memory
            return self._engine.stage()
        return None

    def send(self, version: int, only: int | None = None) -> None:
        """Transfer the weights as ``version`` to every rollout actor, or to the one at index ``only`` alone."""
        handles = self._client.all_handles
        self._client.handles = handles if only is None else [handles[only]]
        self._client.version = version
        self._engine.send_weights()

    def close(self) -> None:
        """Release what the backend holds, such as its shared memory."""
        self._engine.shutdown()


def _init_info(config: RunConfig, rank: int) -> TrainerInitInfo:
    if config.sync.backend == "shm":
        return ShmTrainerInitInfo(rank=rank)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(),
        master_port=port,
        # The sender, and every GPU of every replica.
        world_size=1 + config.rollout.replicas * config.rollout.tensor_parallel_size,
        rank=rank,
    )
