"""The trainer's end of the ``object_store`` weight-transfer backend of vLLM: any number of hosts, without NCCL.

Runs on every trainer rank, because gathering a parameter may take them all; rank 0 publishes, and its ``client`` has
each host put the weights together. The engine's end is that of ``shm``, on the host's file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
)

from async_rl.errors import WeightSyncError
from async_rl.weights.buckets import Publication
from async_rl.weights.object_store import Publisher, Staged
from async_rl.weights.vllm.name_table import name_table, rows
from async_rl.weights.vllm.staging import StagingTrainerEngine, gathered


class HostsClient(VLLMWeightSyncClient, Protocol):  # type: ignore[misc]  # vLLM is not followed
    """A client that reaches engines on several hosts."""

    def fetch_weights(self, offer: Callable[[int], Publication]) -> dict[str, Any]:
        """Have each host fetch what is offered for the round that it has, 0 for none.

        Returns what ``update_weights`` takes: the file of each host.
        """


@dataclass
class ObjectStoreTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """The trainer's rank, and what outlives a connection."""

    backend: ClassVar[str] = "object_store"

    staged: Staged
    publisher: Publisher | None
    """Only rank 0 has one."""


class ObjectStoreTrainerWeightTransferEngine(StagingTrainerEngine):
    """The trainer's end, which gathers the weights where they have changed, publishes and announces them."""

    init_info_cls = ObjectStoreTrainerInitInfo

    def __init__(self, init_info: ObjectStoreTrainerInitInfo, client: HostsClient, source: WeightSource) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._staged = init_info.staged
        self._publisher = init_info.publisher
        if init_info.is_sender:
            client.init_weight_transfer_engine({"table": rows(name_table(source))})

    @classmethod
    def trainer_init(
        cls,
        init_info: ObjectStoreTrainerInitInfo,
        *,
        client: HostsClient,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise WeightSyncError("the object_store backend transfers whole models: it needs a WeightSource")
        return cls(init_info, client, source)

    def _bring(self) -> dict[str, Any] | None:
        """Gather and publish the weights if they have changed, and have every host fetch them."""
        assert self.source is not None  # ``trainer_init`` took one
        if self._staged.stage():
            with gathered(self.source) as tensors:
                if self._publisher is not None:
                    self._publisher.publish(tensors, full=self._staged.repeated)
        if self._publisher is None:
            return None
        update: dict[str, Any] = self.client.fetch_weights(self._publisher.for_host)
        return update
