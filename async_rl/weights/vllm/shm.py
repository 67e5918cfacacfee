"""The ``shm`` weight-transfer backend of vLLM: trainer and engine on one host, weights through ``shm_file``.

Owns two classes that ``plugin`` registers with vLLM's factories. The trainer's end runs on every trainer rank, because
gathering a parameter may take them all; rank 0 writes and announces. The engine's end, which serves ``object_store``
too, verifies everything before it touches the model, so that a transfer that is refused leaves the weights as they
were.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from async_rl.errors import WeightSyncError
from async_rl.weights.on_host import BY_PART
from async_rl.weights.shm_file import Announcement, TensorMeta, WeightFile, read
from async_rl.weights.vllm.name_table import Rows, checked, name_table, rows
from async_rl.weights.vllm.reload import Reload
from async_rl.weights.vllm.staging import StagingTrainerEngine, gathered


@dataclass
class ShmInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """The name table of every transfer."""

    table: Rows


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM is not followed
    """The announcement of one round, with the fields of ``shm_file.Announcement``."""

    pid: int
    fd: int
    nbytes: int
    round: int


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """The trainer's rank alone: the memory file has no address to agree on."""

    backend: ClassVar[str] = "shm"


class ShmTrainerWeightTransferEngine(StagingTrainerEngine):
    """The trainer's end, which gathers the weights, writes them to the file and announces each round."""

    init_info_cls = ShmTrainerInitInfo

    def __init__(self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        metas = name_table(source)
        self._file = WeightFile(metas) if is_sender else None
        if is_sender:
            client.init_weight_transfer_engine({"table": rows(metas)})

    @classmethod
    def trainer_init(
        cls,
        init_info: ShmTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise WeightSyncError("the shm backend transfers whole models: it needs a WeightSource")
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def _bring(self) -> dict[str, Any] | None:
        """Gather the weights and write them to the file. Returns its announcement."""
        assert self.source is not None  # the constructor took one
        with gathered(self.source) as tensors:
            return None if self._file is None else asdict(self._file.write(tensors))

    def shutdown(self) -> None:
        if self._file is not None:
            self._file.close()


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):  # type: ignore[misc]
    """The engine's end, in the process that holds the model; it verifies a round and then loads it."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    # A draft model has a name table of its own, and nothing here trains one.
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._table: list[TensorMeta] | None = None
        self._received = False
        self._reload = Reload(self.model, self.model_config)
        # At each transfer it warns of every layer that received no weights: of the rotary embedding, which has none.
        # The name table already proves that nothing is missing, and repack_tied that no packed copy is left behind.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._table = checked(init_info.table, self.model_config)

    def start_weight_update(self) -> None:
        # Layerwise reloading would take the model apart here, before anything is verified; see receive_weights.
        self._received = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if BY_PART in update_info:
            update_info = update_info[BY_PART][self.parallel_config.node_rank]
        # The base class also synchronizes an accelerator, which fails where there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if self._table is None:
            raise WeightSyncError("update_weights was called before init_weight_transfer_engine")
        tensors = read(Announcement(**vars(update_info)), self._table)
        self._reload.load(tensors)
        self._received = True

    def finish_weight_update(self) -> None:
        if not self._received:
            raise WeightSyncError("the weight transfer was finished, but no weights were received")

    def shutdown(self) -> None:
        """Do nothing: no resource is held between two transfers."""
