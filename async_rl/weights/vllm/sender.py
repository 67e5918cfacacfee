"""The trainer's end of a weight transfer: vLLM's transfer backend, and the clients that reach the rollout actors.

Runs on every trainer rank; rank 0 sends. Imports vLLM, so only trainer processes import this module.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource, WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from async_rl.config.schema import RunConfig
from async_rl.errors import WeightSyncError
from async_rl.runtime import timeouts
from async_rl.weights import ray_store
from async_rl.weights.object_store import Publication, Publisher, Staged
from async_rl.weights.shm_file import Announcement
from async_rl.weights.vllm.object_store import ObjectStoreTrainerInitInfo
from async_rl.weights.vllm.plugin import register
from async_rl.weights.vllm.shm import ShmTrainerInitInfo, name_table

# Of sync.timeout_s, the most that hosts may take to fetch the weights: then a second attempt still has as much.
_FETCH_SHARE = 0.5


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


class HostsSyncClient(VersionedSyncClient):
    """The client for sync.backend object_store: one rollout worker of each host fetches the weights for its engines.

    That is the first worker of the host, among those connected. If it dies, they are connected again without it, and
    another one is the first.
    """

    def __init__(self, rollout_workers: Sequence[Any], timeout_s: float) -> None:
        super().__init__(rollout_workers)
        self._timeout_s = timeout_s
        self._hosts: list[str] = []  # of each of ``all_handles``
        self._announced: dict[str, Announcement] = {}  # the weight file of each host

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._hosts = ray.get([handle.weights_host.remote() for handle in self.all_handles])
        super().init_weight_transfer_engine(init_info)

    def fetch_weights(self, publication: Publication) -> None:
        """Have each host fetch ``publication``. Raises WeightSyncError, and RayError for a worker that is gone."""
        first: dict[str, Any] = {}
        for handle, host in zip(self.all_handles, self._hosts, strict=True):
            first.setdefault(host, handle)
        calls = [
            handle.fetch_weights.remote(publication, number, len(first), self._timeout_s)
            for number, handle in enumerate(first.values())
        ]
        try:
            announced = ray.get(calls, timeout=self._timeout_s + timeouts.ANSWER_S)
        except GetTimeoutError:
            raise WeightSyncError(
                f"a host did not say within {self._timeout_s:g} s that it has the weights; raise sync.timeout_s"
            ) from None
        self._announced = dict(zip(first, announced, strict=True))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        del update_info  # each host has its own
        host_of = dict(zip(self.all_handles, self._hosts, strict=True))
        ray.get(
            [
                handle.update_weights.remote(
                    WeightTransferUpdateRequest(update_info=asdict(self._announced[host_of[handle]]))
                )
                for handle in self.handles
            ]
        )


class WeightSender:
    """Transfers ``source`` to the connected rollout actors at each ``send``.

    Every trainer rank has one for its life, and calls it in step with the others.
    """

    def __init__(self, config: RunConfig, rank: int, *, source: WeightSource) -> None:
        register()
        self._config = config
        self._rank = rank
        self._source = source
        self._staged = Staged()
        self._publisher: Publisher | None = None
        if config.sync_backend == "object_store" and rank == 0:
            self._publisher = Publisher(name_table(source), ray_store.put)
        self._client: VersionedSyncClient | None = None
        self._engine: Any = None

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        """Set up the transfer to these rollout actors, in place of earlier ones."""
        self._disconnect()
        self._staged.connect(rollout_workers)
        if self._config.sync_backend == "object_store":
            self._client = HostsSyncClient(rollout_workers, _FETCH_SHARE * self._config.sync.timeout_s)
        else:
            self._client = VersionedSyncClient(rollout_workers)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._init_info(), client=self._client, source=self._source
        )

    def outdate(self) -> None:
        """Note that the weights change, so that those staged before are not sent again."""
        self._staged.outdate()

    def stage(self) -> None:
        """Do what of the next ``send`` needs no engine, so that engines generate meanwhile."""
        if self._engine is None:
            raise RuntimeError("connect() must be called before stage()")
        if self._config.sync_backend != "nccl":  # which sends from the GPU's memory
            self._engine.stage()

    def send(self, version: int, only: int | None = None) -> None:
        """Transfer the weights as ``version`` to every rollout actor, or to the one at index ``only`` alone."""
        if self._client is None:
            raise RuntimeError("connect() must be called before send()")
        handles = self._client.all_handles
        self._client.handles = handles if only is None else [handles[only]]
        self._client.version = version
        self._engine.send_weights()

    def close(self) -> None:
        """Release what the backend holds, such as its shared memory and the weights in the object store."""
        self._disconnect()
        if self._publisher is not None:
            self._publisher.withdraw()

    def _disconnect(self) -> None:
        engine, self._engine, self._client = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    def _init_info(self) -> TrainerInitInfo:
        if self._config.sync_backend == "shm":
            return ShmTrainerInitInfo(rank=self._rank)
        if self._config.sync_backend == "object_store":
            return ObjectStoreTrainerInitInfo(rank=self._rank, staged=self._staged, publisher=self._publisher)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=port,
            # The sender, and every GPU of every replica.
            world_size=1 + self._config.rollout.replicas * self._config.rollout.tensor_parallel_size,
            rank=self._rank,
        )
