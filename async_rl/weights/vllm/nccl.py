"""Both ends of vLLM's NCCL weight transfer, with what vLLM 0.30 leaves to its caller.

A time limit, after which the communicator is aborted. A process that dies in an NCCL call leaves the others in theirs
for good: NCCL has no time limit, and vLLM leaves it to the caller to abort the communicator
(``NCCLTrainerWeightTransferEngine.send_weights`` says so). Here the ranks meet in a thread that can be left behind, and
a timer aborts a transfer that takes too long.

One CUDA stream for all that is gathered: vLLM's packed producer takes tensors under two streams in turn, and gathering
makes several at a time. See ``under_own_stream``.

The name table: vLLM takes whatever names it is given. See ``name_table``. Does not know Ray.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
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
from async_rl.weights.shm_file import TensorMeta
from async_rl.weights.vllm.name_table import Rows, checked, name_table, rows
from async_rl.weights.vllm.plugin import BACKENDS
from async_rl.weights.vllm.staging import gathered

# After so many times the time for meeting, the thread that waits for the other ranks ends too, and frees the port.
# ``_Meeting.result`` has given up before, with an error that says more.
_STORE_WAITS = 2


@dataclass
class TimedNCCLTrainerInitInfo(NCCLTrainerInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """vLLM's, and the seconds that meeting, and each transfer, may take."""

    backend: ClassVar[str] = BACKENDS["nccl"]

    timeout_s: float = 60.0
    listening: socket.socket | None = None
    """The socket that holds ``master_port``; None on ranks that do not send."""


@dataclass(kw_only=True)
class TimedNCCLInitInfo(NCCLWeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not followed
    """The same for the engine's end, and the name table of every transfer; the trainer sends it."""

    timeout_s: float
    table: Rows


class Client(VLLMWeightSyncClient, Protocol):  # type: ignore[misc]  # vLLM is not followed
    """A client that says at once when a call of it fails."""

    failed: Callable[[Exception], None]


class TimedNCCLTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):  # type: ignore[misc]
    """The trainer's end: its calls return, whatever the engines do, and other ranks can finish what they gather."""

    init_info_cls = TimedNCCLTrainerInitInfo

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
        if engine.is_sender:
            engine._meet(init_info)
        return engine

    def _meet(self, init_info: TimedNCCLTrainerInitInfo) -> None:
        """Open the sender's end while the engines open theirs."""
        meeting = _Meeting(lambda: _open_endpoint(init_info))
        try:
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
                    )
                )
            )
        except BaseException:
            meeting.give_up()
            raise
        self.model_update_group = meeting.result(init_info.timeout_s)
        self._limit = _Limit(self.model_update_group, init_info.timeout_s)
        # The broadcast would wait for engines that have failed.
        self.client.failed = self._limit.abort

    def send_weights(self) -> None:
        if not self.is_sender:
            super().send_weights()
            return
        with self._limit.of("a weight transfer"):
            super().send_weights()

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

    def init_transfer_engine(self, init_info: TimedNCCLInitInfo) -> None:
        self.shutdown()  # what an earlier sender has left
        self._table = checked(init_info.table, self.model_config)
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        meeting = _Meeting(lambda: worker_init_process_group(init_info, self.parallel_config))
        self.model_update_group = meeting.result(init_info.timeout_s)
        self._limit = _Limit(self.model_update_group, init_info.timeout_s)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if self.model_update_group is None:
            raise WeightSyncError("update_weights was called before init_weight_transfer_engine")
        self._check(update_info)
        with self._limit.of("a weight transfer"):
            super().receive_weights(update_info)

    def _check(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Raise WeightSyncError for an update of other tensors than those of the name table, in its order."""
        given = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for row, meta in itertools.zip_longest(given, self._table):
            if row is None or meta is None or TensorMeta(row[0], row[1], tuple(row[2])) != meta:
                raise WeightSyncError(f"the update has {row} where the name table has {meta}; nothing was loaded")

    def shutdown(self) -> None:
        if self.model_update_group is not None:
            self._limit.abort()
            self.model_update_group = None


class _Limit:
    """Aborts a communicator, from another thread, when a transfer takes too long."""

    def __init__(self, communicator: Any, timeout_s: float) -> None:
        self._communicator = communicator
        self._timeout_s = timeout_s
        self._aborted = False
        self._because: Exception | None = None
        self._lock = threading.Lock()

    def abort(self, because: Exception | None = None) -> None:
        """End calls under way, in whichever thread, for good; ``because`` is None when the time limit is over."""
        with self._lock:
            if self._aborted:
                return
            self._aborted, self._because = True, because
        self._communicator.destroy()

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Abort when this block takes longer. Raises the reason if it was aborted, also if no call has noticed.

        With its communicator aborted, vLLM skips every broadcast, and would load what is in its buffers.
        """
        timer = threading.Timer(self._timeout_s, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception:
            self._raise_if_aborted(what)
            raise
        finally:
            timer.cancel()
        self._raise_if_aborted(what)

    def _raise_if_aborted(self, what: str) -> None:
        if self._aborted:
            raise self._because or WeightSyncError(
                f"{what} over NCCL took longer than {self._timeout_s:g} s, half of sync.timeout_s; raise it, or see "
                "the logs of engines and trainer"
            )


class _Meeting:
    """Waits for the other ranks of a communicator in a thread, which has no end if they do not come.

    ``make`` opens this rank's end and returns the communicator, on the device of the thread that calls this.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._future: Future[Any] = Future()
        self._lock = threading.Lock()
        self._given_up = False
        device = torch.accelerator.current_device_index()

        def meet() -> None:
            try:
                with torch.accelerator.device_index(device):
                    communicator = make()
            except BaseException as error:  # noqa: BLE001 - ``result`` raises it
                self._future.set_exception(error)
                return
            with self._lock:
                if not self._given_up:
                    self._future.set_result(communicator)
                    return
            communicator.destroy()

        threading.Thread(target=meet, daemon=True).start()

    def result(self, timeout_s: float) -> Any:
        """Return the communicator. Raises WeightSyncError after that long, and what ``make`` raised."""
        try:
            return self._future.result(timeout_s)
        except TimeoutError:
            self.give_up()
            raise WeightSyncError(
                f"trainer and engines did not meet for NCCL within {timeout_s:g} s, half of sync.timeout_s; see the "
                "logs of the engines, and check that they reach the trainer's host"
            ) from None

    def give_up(self) -> None:
        """Destroy the communicator if the others do come."""
        with self._lock:
            self._given_up = True
            made = self._future.done() and self._future.exception() is None
        if made:
            self._future.result().destroy()
