"""Both ends of vLLM's NCCL weight transfer, with what vLLM 0.30 leaves to its caller, and the trainer's for SGLang.

A time limit, after which the communicator is aborted. A process that dies in an NCCL call leaves the others in theirs
for good: NCCL has no time limit, and vLLM leaves it to the caller to abort the communicator
(``NCCLTrainerWeightTransferEngine.send_weights`` says so). Here the ranks meet in a thread that can be left behind, and
a timer aborts a transfer that takes too long.

One CUDA stream for all that is gathered: vLLM's packed producer takes tensors under two streams in turn, and gathering
makes several at a time. See ``under_own_stream``.

The name table: vLLM takes whatever names it is given. See ``name_table``.

Several senders. The first rank of each pipeline stage may send its own layers (sync.senders stages): each has a
communicator with all engines, and they send in turn within one update. Trainer rank 0 calls the engines for all; the
others wait in their first broadcast until the engines come to it.

SGLang's engines. They meet in a process group of torch's in place of vLLM's communicator, and receive the same packs:
see ``sglang_group``. Does not know Ray.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    worker_init_payload,
    worker_init_process_group,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from async_rl.errors import WeightSyncError
from async_rl.weights.sglang_group import SenderGroup
from async_rl.weights.shm_file import TensorMeta
from async_rl.weights.vllm.name_table import Rows, checked, name_table, rows
from async_rl.weights.vllm.nccl_limit import Limit, Meeting
from async_rl.weights.vllm.plugin import BACKENDS
from async_rl.weights.vllm.staging import gathered

# After so many times the time for meeting, the thread that waits for the other ranks ends too, and frees the port.
# ``Meeting.result`` has given up before, with an error that says more.
_STORE_WAITS = 2


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a sender waits for the engines, and what it sends."""

    address: str
    port: int
    table: Rows


@dataclass
class TimedNCCLTrainerInitInfo(NCCLTrainerInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """vLLM's, and the seconds that meeting, and each transfer, may take."""

    backend: ClassVar[str] = BACKENDS["nccl"]

    timeout_s: float = 60.0
    listening: socket.socket | None = None
    """The socket that holds ``master_port``; None on ranks that do not send."""
    others: list[Endpoint] = field(default_factory=list)
    """Where the engines meet the senders after rank 0, which alone needs to know."""
    torch_backend: str | None = None
    """The backend of torch's process groups in which SGLang's engines receive; None for engines of vLLM."""

    @property
    def is_sender(self) -> bool:
        return self.rank == 0 or self.listening is not None


@dataclass(kw_only=True)
class TimedNCCLInitInfo(NCCLWeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """The same for the engine's end, and the name table of every transfer; the trainer sends it."""

    timeout_s: float
    table: Rows
    others: list[dict[str, Any]] = field(default_factory=list)
    """The senders after the first, with the fields of ``Endpoint``."""
    torch_backend: str | None = None


@dataclass
class TimedNCCLUpdateInfo(NCCLWeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM is not followed
    """What one sender sends."""

    sender: int = 0


class Client(VLLMWeightSyncClient, Protocol):  # type: ignore[misc]  # vLLM is not followed
    """A client that says at once when a call of it fails."""

    failed: Callable[[Exception], None]


class _InTurn:
    """A client that has the engines receive from the senders after the first once they have from that one."""

    def __init__(self, client: Client, others: Sequence[Endpoint]) -> None:
        self._client = client
        self._others = list(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._client.update_weights(update_info)
        for number, endpoint in enumerate(self._others, start=1):
            tensor_names, dtypes, shapes = map(list, zip(*endpoint.table, strict=True))
            self._client.update_weights(asdict(TimedNCCLUpdateInfo(tensor_names, dtypes, shapes, sender=number)))


class TimedNCCLTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):  # type: ignore[misc]
    """The trainer's end: its calls return, whatever the engines do, and other ranks can finish what they gather."""

    init_info_cls = TimedNCCLTrainerInitInfo
    client: Any

    @classmethod
    def trainer_init(
        cls,
        init_info: TimedNCCLTrainerInitInfo,
        *,
        client: Client,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise WeightSyncError("the nccl backend transfers whole models: it needs a WeightSource")
        engine = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed=init_info.packed,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            packed_num_buffers=init_info.packed_num_buffers,
        )
        engine._calls_engines = init_info.rank == 0
        if engine.is_sender:
            engine._meet(init_info)
        return engine

    def _meet(self, init_info: TimedNCCLTrainerInitInfo) -> None:
        """Open the sender's end while the engines open theirs."""
        meeting = Meeting(lambda: _open_endpoint(init_info))
        try:
            if self._calls_engines:
                self._call_engines(init_info)
        except BaseException:
            meeting.give_up()
            raise
        self.model_update_group = meeting.result(init_info.timeout_s)
        self._limit = Limit(self.model_update_group, init_info.timeout_s)
        if self._calls_engines:
            # The broadcast would wait for engines that have failed.
            self.client.failed = self._limit.abort
            self.client = _InTurn(self.client, init_info.others)

    def _call_engines(self, init_info: TimedNCCLTrainerInitInfo) -> None:
        """Have the engines come to all senders."""
        self.client.init_weight_transfer_engine(
            worker_init_payload(
                TimedNCCLInitInfo(
                    master_address=init_info.master_address,
                    master_port=init_info.master_port,
                    rank_offset=1,  # after the sender, which is rank 0
                    world_size=init_info.world_size,
                    packed=init_info.packed,
                    packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
                    packed_num_buffers=init_info.packed_num_buffers,
                    timeout_s=init_info.timeout_s,
                    table=rows(name_table(self.source)),
                    others=[asdict(endpoint) for endpoint in init_info.others],
                    torch_backend=init_info.torch_backend,
                )
            )
        )

    def send_weights(self) -> None:
        if not self.is_sender:
            super().send_weights()
            return
        with self._limit.of("a weight transfer"):
            if self._calls_engines:
                super().send_weights()
            else:
                self._broadcast(self.source, self.source.metadata())
                self._post_send_sync()

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        with gathered(source) as tensors:
            if self.is_sender:
                # That of now: the parameters were written under it.
                tensors = under_own_stream(tensors, torch.cuda.current_stream())
            super()._broadcast(tensors, meta)

    def shutdown(self) -> None:
        if self.model_update_group is not None:
            self._limit.abort()
            self.model_update_group = None


def under_own_stream(
    tensors: Iterator[tuple[str, torch.Tensor]], making: torch.cuda.Stream
) -> Iterator[tuple[str, torch.Tensor]]:
    """Take ``tensors`` under the stream ``making``, and make each safe to use under the stream of who asks for it.

    vLLM's producer (``packed_nccl_broadcast_producer``) asks for each tensor under the stream that will pack it, and
    changes streams when a pack is full. Gathering makes several tensors at a time, also of one message, and yields them
    later: then packing would not wait until a tensor is there, and the memory of one that was dropped would be used
    again while the other stream still reads it.
    """
    while True:
        with torch.cuda.stream(making):
            item = next(tensors, None)
        if item is None:
            return
        using = torch.cuda.current_stream()
        if using != making:
            using.wait_stream(making)
            item[1].record_stream(using)
        yield item


def _open_endpoint(init_info: TimedNCCLTrainerInitInfo) -> Any:
    """Serve the store where the ranks meet at the port that is held, and return rank 0's communicator.

    Does what vLLM's ``nccl_common.trainer_init`` does, which takes no socket: it binds the port when it is called, by
    IPv4 alone, and waits for 300 s.
    """
    if init_info.torch_backend is not None:
        assert init_info.listening is not None
        return SenderGroup(
            init_info.master_address,
            init_info.listening,
            init_info.world_size,
            backend=init_info.torch_backend,
            timeout_s=init_info.timeout_s,
        )
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(
        host=init_info.master_address,
        port=init_info.master_port,
        rank=0,
        world_size=init_info.world_size,
        store_timeout=_STORE_WAITS * init_info.timeout_s,
        listen_socket=init_info.listening,
    )
    return PyNcclCommunicator(group, device=torch.accelerator.current_device_index())


class TimedNCCLWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # vLLM is not followed
    """The engine's end, in the process that holds the model. A transfer that was aborted leaves unknown weights."""

    init_info_cls = TimedNCCLInitInfo
    update_info_cls = TimedNCCLUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._senders: list[_Sender] = []

    def init_transfer_engine(self, init_info: TimedNCCLInitInfo) -> None:
        self.shutdown()  # what earlier senders have left
        endpoints = [Endpoint(init_info.master_address, init_info.master_port, init_info.table)]
        endpoints += [Endpoint(**each) for each in init_info.others]
        table = iter(checked([row for each in endpoints for row in each.table], self.model_config))
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        try:
            self._come_to(endpoints, table, init_info)
        except BaseException:
            self.shutdown()
            raise

    def _come_to(self, endpoints: list[Endpoint], table: Iterator[TensorMeta], init_info: TimedNCCLInitInfo) -> None:
        """Meet the senders one after the other; ``table`` has the tensors of all."""
        for endpoint in endpoints:
            info: Any = replace(init_info, master_address=endpoint.address, master_port=endpoint.port)  # type: ignore[call-arg]
            meeting = Meeting(partial(worker_init_process_group, info, self.parallel_config))
            communicator = meeting.result(init_info.timeout_s)
            of_sender = list(itertools.islice(table, len(endpoint.table)))
            self._senders.append(_Sender(communicator, Limit(communicator, init_info.timeout_s), of_sender))

    def receive_weights(self, update_info: TimedNCCLUpdateInfo) -> None:
        if not self._senders:
            raise WeightSyncError("update_weights was called before init_weight_transfer_engine")
        sender = self._senders[update_info.sender]
        sender.check(update_info)
        self.model_update_group = sender.communicator
        with sender.limit.of("a weight transfer"):
            super().receive_weights(update_info)

    def shutdown(self) -> None:
        self.model_update_group = None
        senders, self._senders = self._senders, []
        for sender in senders:
            sender.limit.abort()


@dataclass(frozen=True, slots=True)
class _Sender:
    """What an engine has with one of the trainer's senders."""

    communicator: Any
    limit: Limit
    table: list[TensorMeta]

    def check(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Raise WeightSyncError for an update of other tensors than those of the name table, in its order."""
        given = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for row, meta in itertools.zip_longest(given, self.table):
            if row is None or meta is None or TensorMeta(row[0], row[1], tuple(row[2])) != meta:
                raise WeightSyncError(f"the update has {row} where the name table has {meta}; nothing was loaded")
