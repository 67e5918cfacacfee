"""The file that carries the weights to the engines of one host: layout, writing, verification.

The trainer writes it (sync.backend shm), or a rollout worker of the host does, with what it fetched (``object_store``).
It is an anonymous memory file (memfd) without a name in /dev/shm, so nothing is left behind when a process dies.
Readers open it as /proc/<pid>/fd/<fd> of the writer. Knows torch, xxhash and safetensors, but not vLLM or Megatron.

    head     magic, format version, round, size of the file, size of the table, checksum of table and digests
    table    JSON: [name, dtype, shape, offset, bytes] of each tensor
    digests  xxh3_64 of each tensor, uint64
    tensors  raw bytes, each at a multiple of 64

The round is 0 while a round is being written, so a torn file is refused like any other.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import xxhash
from safetensors import safe_open

from async_rl.errors import WeightSyncError

MAGIC = b"ARLWGHTS"
FORMAT_VERSION = 2
HEAD = struct.Struct("<8sIIQQQ")
ALIGNMENT = 64  # The size of a cache line, and more than any dtype needs.


class Described(Protocol):
    """A tensor, or what describes one, such as vLLM's ParamMeta."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> Iterable[int]: ...


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One entry of the name table."""

    name: str
    dtype: str
    """As torch spells it, without the leading "torch."."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Described) -> Self:
        """Return the entry of a tensor, or of what describes one."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        size: int = _dtype(self.name, self.dtype).itemsize
        return math.prod(self.shape) * size


@dataclass(frozen=True, slots=True)
class Announcement:
    """The writer's message to the readers of one round: where the file is, and which round it must hold."""

    pid: int
    fd: int
    nbytes: int
    round: int


class Layout:
    """Where everything is in a weight file with these tensors, which follows from their name table alone."""

    def __init__(self, metas: Sequence[TensorMeta]) -> None:
        self.metas = list(metas)
        self.offsets: list[int] = []
        """Where each tensor is, counted from ``data``: the table that holds them precedes it."""
        position = 0
        for meta in self.metas:
            self.offsets.append(position)
            position += _aligned(meta.nbytes)
        rows = [
            [m.name, m.dtype, list(m.shape), offset, m.nbytes]
            for m, offset in zip(self.metas, self.offsets, strict=True)
        ]
        self._table = json.dumps(rows).encode()
        self.data = _aligned(HEAD.size + len(self._table) + 8 * len(self.metas))
        """Where the tensors begin."""
        self.nbytes = self.data + position
        """Size of the whole file."""

    def unfinished(self) -> bytes:
        """Return the head of a file whose round is not complete, which readers refuse."""
        return self._head(0, 0)

    def finished(self, round_: int, digests: Sequence[int]) -> bytes:
        """Return head, table and digests of a complete round: the file's bytes before its tensors, without padding."""
        checked: bytes = self._table + struct.pack(f"<{len(digests)}Q", *digests)
        return self._head(round_, xxhash.xxh3_64_intdigest(checked)) + checked

    def checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, TensorMeta, int]]:
        """Yield each tensor with its entry of the table and its offset from ``data``.

        Raises WeightSyncError when ``tensors`` are not those of the table, in its order.
        """
        count = 0
        for (name, tensor), meta, offset in zip(tensors, self.metas, self.offsets, strict=False):
            given = TensorMeta.of(name, tensor)
            if given != meta:
                raise WeightSyncError(
                    f"the trainer yielded {_describe(given)} where its name table has {_describe(meta)}"
                )
            yield tensor, meta, offset
            count += 1
        if count != len(self.metas):
            raise WeightSyncError(f"the trainer yielded {count} tensors, its name table has {len(self.metas)}")

    def _head(self, round_: int, checksum: int) -> bytes:
        return HEAD.pack(MAGIC, FORMAT_VERSION, len(self._table), round_, self.nbytes, checksum)


class MemoryFile:
    """An anonymous file of a fixed size, which other processes of this host and user can open while this one lives."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create("async_rl_weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        # A reader's mapping can then never reach beyond the file, which would kill it with SIGBUS.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def announce(self, round_: int) -> Announcement:
        """Return what readers need in order to find that round in it."""
        return Announcement(os.getpid(), self.fd, self.nbytes, round_)

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write ``data`` at ``position``. Other threads of the process run meanwhile. Raises OSError."""
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(self.fd, left, position)
            left, position = left[written:], position + written

    def close(self) -> None:
        """Free the memory; readers that still map it keep it until they are done."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class WeightFile:
    """The writer's end: one file for the life of the trainer, overwritten in each round."""

    def __init__(self, metas: Sequence[TensorMeta]) -> None:
        self._layout = Layout(metas)
        self._round = 0
        self._file = MemoryFile(self._layout.nbytes)
        self._map = mmap.mmap(self._file.fd, self._layout.nbytes)

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Announcement:
        """Write one round and return its announcement.

        Raises WeightSyncError when ``tensors`` are not those of the name table, in its order.
        """
        self._round += 1
        self._file.write(self._layout.unfinished(), 0)
        digests = []
        whole = memoryview(self._map)
        for tensor, meta, offset in self._layout.checked(tensors):
            start = self._layout.data + offset
            place = whole[start : start + meta.nbytes]
            if meta.nbytes:
                torch.frombuffer(place, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            digests.append(xxhash.xxh3_64_intdigest(place))
        finished = self._layout.finished(self._round, digests)
        # What it describes before the head that says so.
        self._file.write(finished[HEAD.size :], HEAD.size)
        self._file.write(finished[: HEAD.size], 0)
        return self._file.announce(self._round)

    def close(self) -> None:
        """Free the memory; readers that still map it keep it until they are done."""
        if self._file.fd >= 0:
            self._map.close()
            self._file.close()


def read(announcement: Announcement, expected: Sequence[TensorMeta]) -> list[tuple[str, torch.Tensor]]:
    """Map the announced round, verify all of it, and return its tensors as views on the mapping, in the table's order.

    The views are valid until the writer's next round: copy what must last. Raises WeightSyncError, which names the
    field or tensor, when the file is not the announced one, is damaged, or has another name table than ``expected``.
    """
    data = _map(announcement)
    if len(data) < HEAD.size:
        raise WeightSyncError(f"weight file: {len(data)} bytes, too short for its head of {HEAD.size}")
    magic, version, table_bytes, round_, nbytes, checksum = HEAD.unpack_from(data, 0)
    if magic != MAGIC:
        raise WeightSyncError(f"weight file: starts with {magic!r}, not {MAGIC!r}: it is not a weight file")
    if version != FORMAT_VERSION:
        raise WeightSyncError(f"weight file: format version {version}, this engine reads {FORMAT_VERSION}")
    if round_ != announcement.round:
        raise WeightSyncError(
            f"weight file: holds round {round_}, announced was {announcement.round} (0 is unfinished)"
        )
    if nbytes != len(data):
        raise WeightSyncError(f"weight file: {len(data)} bytes, its head says {nbytes}")
    digests_at = HEAD.size + table_bytes
    end = digests_at + 8 * len(expected)
    if end > len(data) or xxhash.xxh3_64_intdigest(memoryview(data)[HEAD.size : end]) != checksum:
        raise WeightSyncError(
            f"weight file: the name table does not match its checksum, or is not one of {len(expected)} tensors"
        )
    table = json.loads(data[HEAD.size : digests_at])
    digests = struct.unpack_from(f"<{len(expected)}Q", data, digests_at)
    tensors = []
    for (name, dtype, shape, offset, size), digest, want in zip(table, digests, expected, strict=True):
        meta = TensorMeta(name, dtype, tuple(shape))
        if meta != want:
            raise WeightSyncError(f"weight file: has {_describe(meta)} where {_describe(want)} was agreed")
        start = _aligned(end) + offset
        if size != meta.nbytes or start + size > len(data):
            raise WeightSyncError(f"weight file: {_describe(meta)} has {size} bytes at {start}, which cannot be")
        if xxhash.xxh3_64_intdigest(memoryview(data)[start : start + size]) != digest:
            raise WeightSyncError(f"weight file: {_describe(meta)} does not match its checksum; nothing was loaded")
        kind = _dtype(name, dtype)
        count = size // kind.itemsize
        flat = torch.frombuffer(data, dtype=kind, count=count, offset=start) if count else torch.empty(0, dtype=kind)
        tensors.append((name, flat.view(meta.shape)))
    return tensors


def check_against_checkpoint(table: Sequence[TensorMeta], folder: Path, *, ignored: Callable[[str], bool]) -> None:
    """Compare ``table`` with the tensors of the checkpoint that the engine was loaded from, in ``folder``.

    vLLM loads the tensors that it is given and keeps the old values of the rest, so a missing or misnamed tensor would
    go unnoticed. Names that are ``ignored`` may be absent on either side: the trainer does not build them. A
    checkpoint that is not in safetensors is not checked. Raises WeightSyncError when the two differ.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    if not shapes:
        return
    given = {meta.name: meta.shape for meta in table}
    if len(given) != len(table):
        raise WeightSyncError(
            f"the trainer's name table names a tensor twice: {len(table)} entries, {len(given)} names"
        )
    for problem, names in (
        ("lacks", {name for name in shapes.keys() - given.keys() if not ignored(name)}),
        ("has, unlike the checkpoint,", {name for name in given.keys() - shapes.keys() if not ignored(name)}),
    ):
        if names:
            raise WeightSyncError(
                f"the trainer's name table {problem} {len(names)} tensors, first {min(names)}; {folder}"
            )
    for name in given.keys() & shapes.keys():
        if given[name] != shapes[name]:
            raise WeightSyncError(
                f"tensor {name}: {list(given[name])} in the trainer, {list(shapes[name])} in {folder}"
            )


def _map(announcement: Announcement) -> mmap.mmap:
    path = f"/proc/{announcement.pid}/fd/{announcement.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WeightSyncError(
            f"weight file {path}: {error.strerror}; its writer must be alive, and of this user and host; "
            "set sync.backend to object_store for engines on other hosts than the trainer's"
        ) from None
    try:
        size = os.fstat(fd).st_size
        if size != announcement.nbytes:
            raise WeightSyncError(f"weight file {path}: {size} bytes, announced were {announcement.nbytes}")
        # Private: a reader that wrote to it would change its own copy only. torch has no read-only tensors.
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _dtype(name: str, dtype: str) -> torch.dtype:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise WeightSyncError(f"tensor {name}: {dtype!r} is not a dtype of torch")
    return kind


def _describe(meta: TensorMeta) -> str:
    return f"{meta.name} {meta.dtype}{list(meta.shape)}"
