"""Stand-ins for what vLLM's NCCL transfer meets, broadcasts and orders with, between threads and on the CPU.

They wait as NCCL does: for ranks that never come, and for peers that take no part in a broadcast, until ``destroy``.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from unittest import mock

import torch


class Meeting:
    """Ranks that come to one port; complete when there are as many as the first one said."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.ranks: set[int] = set()
        self.changed = threading.Condition()
        self.sent: list[torch.Tensor] = []
        self.received = 0


class Group:
    """In place of StatelessProcessGroup, whose ``create`` waits for all ranks."""

    meetings: dict[int, Meeting]
    patience_s = 120.0  # of a test, when what is tested does not end the wait

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world_size, self.meeting = rank, meeting.world_size, meeting

    @classmethod
    def create(
        cls,
        *,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        store_timeout: float = 300.0,
        listen_socket: socket.socket | None = None,
    ) -> Group:
        if listen_socket is not None:
            listen_socket.close()  # nothing is served there
        meeting = cls.meetings.setdefault(port, Meeting(world_size))
        with meeting.changed:
            assert meeting.world_size == world_size
            assert rank not in meeting.ranks, f"rank {rank} is there twice"
            assert rank < world_size
            meeting.ranks.add(rank)
            meeting.changed.notify_all()
            meeting.changed.wait_for(lambda: len(meeting.ranks) == world_size, cls.patience_s)
            if len(meeting.ranks) < world_size:
                raise RuntimeError("ranks have not come")
        return cls(rank, meeting)


class Communicator:
    """In place of PyNcclCommunicator: a broadcast ends when every rank has taken part in it, or by ``destroy``."""

    made: list[Communicator]

    def __init__(self, group: Group, device: object) -> None:
        self.group, self.device = group, device
        self.disabled = False
        self.count = 0
        self.made.append(self)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        if self.disabled:
            return
        meeting, index = self.group.meeting, self.count
        self.count += 1
        with meeting.changed:
            if self.group.rank == src:
                meeting.sent.append(tensor.clone())
            else:
                self._wait(lambda: len(meeting.sent) > index)
                tensor.copy_(meeting.sent[index])
                meeting.received += 1
            meeting.changed.notify_all()
            self._wait(lambda: meeting.received >= (index + 1) * (meeting.world_size - 1))

    def destroy(self) -> None:
        with self.group.meeting.changed:
            self.disabled = True
            self.group.meeting.changed.notify_all()

    def _wait(self, done) -> None:
        meeting = self.group.meeting
        if not meeting.changed.wait_for(lambda: self.disabled or done(), Group.patience_s):
            raise AssertionError("the broadcast was not ended")
        if self.disabled:
            raise RuntimeError("NCCL error: aborted")


class Stream:
    """In place of a CUDA stream: counts what it was given to do, and how much of the others' it begins after."""

    current = threading.local()

    def __init__(self) -> None:
        self.issued = 0
        self.after: dict[Stream, int] = {}

    def issue(self) -> int:
        """Give it something to do, and return the number of that."""
        self.issued += 1
        return self.issued

    def wait_stream(self, other: Stream) -> None:
        for stream, count in {**other.after, other: other.issued}.items():
            self.after[stream] = max(self.after.get(stream, 0), count)

    def synchronize(self) -> None: ...

    @classmethod
    def now(cls) -> Stream:
        """Return the current stream of this thread; each has a default stream of its own."""
        if not hasattr(cls.current, "stream"):
            cls.current.stream = cls()
        found: Stream = cls.current.stream
        return found

    @classmethod
    @contextlib.contextmanager
    def as_current(cls, stream: Stream) -> Iterator[None]:
        before, cls.current.stream = cls.now(), stream
        try:
            yield
        finally:
            cls.current.stream = before


def made(tensor: torch.Tensor) -> torch.Tensor:
    """Note under which stream a tensor was made. It must not be handed out to another one that may come too early."""
    stream = Stream.now()
    tensor.made = stream, stream.issue()
    tensor.recorded = {stream}
    return tensor


def record(tensor: torch.Tensor, stream: Stream) -> None:
    """Note that a stream reads a tensor, of those whose making was noted."""
    if hasattr(tensor, "made"):
        tensor.recorded.add(stream)


def check_handed_out(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Assert that the current stream may read a tensor, and that its memory is not used again meanwhile."""
    name, tensor = item
    if hasattr(tensor, "made"):
        stream, number = tensor.made
        using = Stream.now()
        assert using is stream or using.after.get(stream, 0) >= number, f"{name} may not be there yet"
        # Otherwise its memory goes back to the stream that made it, when the last reference is dropped.
        assert using in tensor.recorded, f"{name} may be overwritten while it is read"
    return item


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let vLLM's NCCL engines run in this process without a GPU, with the stand-ins of this module."""
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import pynccl

    Group.meetings, Communicator.made = {}, []
    with (
        mock.patch.object(utils, "StatelessProcessGroup", Group),
        mock.patch.object(pynccl, "PyNcclCommunicator", Communicator),
        streams_on_cpu(),
    ):
        yield


@contextlib.contextmanager
def streams_on_cpu() -> Iterator[None]:
    """Let vLLM's packed producer and consumer run without a GPU; communicators are as they are."""
    from vllm.distributed.weight_transfer import packed_tensor

    pack_tensors = packed_tensor.pack_tensors

    def pack_checked(iterator, *arguments):
        return pack_tensors(map(check_handed_out, iterator), *arguments)

    with (
        mock.patch.object(packed_tensor, "_get_streams", lambda _, count: [Stream() for _ in range(count)]),
        mock.patch.object(packed_tensor, "pack_tensors", pack_checked),
        mock.patch.object(torch.cuda, "stream", Stream.as_current),
        mock.patch.object(torch.cuda, "current_stream", Stream.now),
        mock.patch.object(torch.Tensor, "record_stream", record),
        mock.patch.object(torch.accelerator, "current_device_index", return_value=None),
        mock.patch.object(torch.accelerator, "synchronize"),
    ):
        yield
