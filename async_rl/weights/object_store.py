"""Weights across hosts through an object store: cut into buckets by the trainer, put together once on each host.

    trainer rank 0      gathers, fills bucket after bucket, puts each into the store            ``Publisher``
    a host's worker     fetches the buckets and writes them into the host's memory file        ``HostWeights``
    its engines         load from that file, as from the trainer's with sync.backend shm        ``shm_file.read``

A bucket is a stretch of the weight file's tensors (``shm_file``), whatever tensors it begins and ends in, so that
neither end ever holds more than a few buckets beside the store and the file. Each has a checksum, and each tensor has
its own in the file: the host checks the first when a bucket arrives, the engine the second before it loads.

Ray's store moves an object from any host that has it. Hosts therefore begin at different buckets, and serve each other
those that they have. Knows torch and numpy, neither Ray nor vLLM: ``put`` and ``get`` are given.
"""

from __future__ import annotations

import concurrent.futures
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import HEAD, Announcement, Layout, MemoryFile, TensorMeta

# Takes a tenth of a second on a link of 25 Gbit/s, long against the milliseconds that the store needs for each object,
# while what an end holds of them at one time stays below a gigabyte.
MAX_BUCKET_BYTES = 256 * 2**20
# A smaller model is cut into as many buckets all the same, because a host can serve only buckets that it has whole.
BUCKETS = 64
MIN_BUCKET_BYTES = 2**20
# Buckets on their way to a host at one time: others travel while one is checked and written.
_AHEAD = 3

Array = np.ndarray[Any, np.dtype[np.uint8]]
Put = Callable[[Array], Any]
"""Stores a copy of an array of bytes and returns a reference to it, as ``ray.put`` does."""
Get = Callable[[Any], "concurrent.futures.Future[Array]"]
"""Begins to fetch what a reference stands for, as ``ray.ObjectRef.future`` does."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One stretch of the weight file."""

    start: int
    """Where it begins in the file."""
    nbytes: int
    checksum: int
    """xxh3_64 of its bytes."""
    reference: Any
    """Where it is in the store."""


@dataclass(frozen=True, slots=True)
class Publication:
    """The weights of one round in the store. While one exists, also in another process, so do its buckets."""

    round: int
    nbytes: int
    """Size of the whole weight file."""
    buckets: list[Bucket]
    """The file's tensors, in order and without gaps."""
    head: Bucket
    """The file's head, table and digests, which make it a finished file."""


def bucket_bytes(nbytes: int) -> int:
    """Return the size of each bucket, the last one apart, for ``nbytes`` of tensors."""
    wanted = min(max(nbytes // BUCKETS, MIN_BUCKET_BYTES), MAX_BUCKET_BYTES)
    return -(-wanted // 64) * 64


def rotated(buckets: Sequence[Bucket], host: int, hosts: int) -> list[Bucket]:
    """Return the buckets in the order in which host number ``host`` of ``hosts`` fetches them."""
    begin = len(buckets) * host // hosts
    return [*buckets[begin:], *buckets[:begin]]


class Publisher:
    """The trainer's end, on rank 0: keeps the weights of one version in the store, those published last."""

    def __init__(self, metas: Sequence[TensorMeta], put: Put, *, size: int | None = None) -> None:
        """Prepare for tensors of this name table. ``size`` replaces the bucket size that suits the model."""
        self._layout = Layout(metas)
        self._put = put
        self._size = size or bucket_bytes(self._layout.nbytes - self._layout.data)
        # A host tells publications apart by their round: those of two trainers of one run differ.
        self._round = secrets.randbits(48)
        self.current: Publication | None = None
        """What was published last, if that was complete."""

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Publication:
        """Put these tensors into the store in place of what was published before, and return where they are.

        Raises WeightSyncError when they are not those of the name table, in its order, and what ``put`` raises.
        """
        self.withdraw()  # first, or the store would hold both
        self._round += 1
        filling = _Filling(self._layout.data, self._size, self._store)
        digests = []
        for tensor, meta, offset in self._layout.checked(tensors):
            filling.skip_to(self._layout.data + offset)
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if meta.nbytes else torch.empty(0)
            digests.append(filling.append(flat))
        filling.skip_to(self._layout.nbytes)
        filling.flush()
        head = np.frombuffer(self._layout.finished(self._round, digests), dtype=np.uint8)
        self.current = Publication(self._round, self._layout.nbytes, filling.buckets, self._store(head, 0))
        return self.current

    def withdraw(self) -> None:
        """Let the store free the weights, except for a host that still fetches them."""
        self.current = None

    def _store(self, array: Array, start: int) -> Bucket:
        return Bucket(start, array.nbytes, _checksum(array), self._put(array))


class Staged:
    """Whether the weights published last can be sent once more, for example to a replica that joins.

    Every trainer rank has one and answers alike, whatever failed on another rank: gathering takes all of them. So it
    goes by calls that reach all ranks. To connect again to a replica that was given these weights is a second attempt.
    """

    def __init__(self) -> None:
        self._valid = False
        self._given: set[Hashable] = set()  # receivers that were connected when these weights were staged
        self._connected: set[Hashable] = set()

    def connect(self, receivers: Iterable[Hashable]) -> None:
        """Note a new connection, in place of the one before."""
        self._connected = set(receivers)
        if self._connected & self._given:
            self._valid = False

    def outdate(self) -> None:
        """Note that the trainer's weights change."""
        self._valid = False

    def stage(self) -> bool:
        """Note that the weights of now are staged; return whether they must be gathered for that."""
        gather = not self._valid
        self._given = set(self._connected) if gather else self._given | self._connected
        self._valid = True
        return gather


class _Filling:
    """Cuts a stream of bytes into buckets of one size; one buffer holds the bucket that is not full yet."""

    def __init__(self, start: int, size: int, store: Callable[[Array, int], Bucket]) -> None:
        self._start = start  # of the bucket, in the file
        self._filled = 0
        self._store = store
        # Page-locked, a copy from a GPU is several times as fast.
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._bytes: Array = self._buffer.numpy()
        self.buckets: list[Bucket] = []

    def append(self, flat: torch.Tensor) -> int:
        """Append the bytes uint8[n] of a tensor on any device, and return their xxh3_64."""
        digest = xxhash.xxh3_64()
        done = 0
        while done < len(flat):
            count = min(len(flat) - done, len(self._bytes) - self._filled)
            place = slice(self._filled, self._filled + count)
            self._buffer[place].copy_(flat[done : done + count])
            digest.update(self._bytes[place].data)
            self._advance(count)
            done += count
        return digest.intdigest()

    def skip_to(self, position: int) -> None:
        """Append zeros up to this position of the file."""
        while (left := position - self._start - self._filled) > 0:
            count = min(left, len(self._bytes) - self._filled)
            self._bytes[self._filled : self._filled + count] = 0
            self._advance(count)

    def flush(self) -> None:
        """Store the last bucket, which may be smaller."""
        if self._filled:
            self.buckets.append(self._store(self._bytes[: self._filled], self._start))
            self._start += self._filled
            self._filled = 0

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._bytes):
            self.flush()


class HostWeights:
    """A host's end, in one rollout worker of the host: puts publications together in a memory file for its engines."""

    def __init__(self, get: Get) -> None:
        self._get = get
        self._lock = threading.Lock()  # of the two below
        self._latest = 0  # counts calls of ``fetch`` and ``close``: all but the last are superseded
        self._file: _RoundFile | None = None  # none while a call fills it

    def fetch(self, publication: Publication, *, host: int, hosts: int, timeout_s: float) -> Announcement:
        """Bring ``publication`` to this host and return the announcement of its file, for ``shm_file.read``.

        ``host`` of ``hosts`` is this host's number, from 0, which says where it begins. A publication that the file has
        already is not fetched again. A later call ends one that is under way. Raises WeightSyncError when a bucket
        cannot be had within ``timeout_s`` seconds for all, or is not what was published.
        """
        with self._lock:
            self._latest += 1
            call, file = self._latest, self._file
            if file is not None and file.round == publication.round:
                return file.announcement()
            self._file = None
        try:
            if file is None or file.nbytes != publication.nbytes:
                if file is not None:
                    file.close()
                file = _RoundFile(publication.nbytes)
            self._fill(file, publication, rotated(publication.buckets, host, hosts), timeout_s, call)
        finally:
            # Also a file that was not finished: the next round is written into the same memory.
            if file is not None and not self._keep(file, call):
                file.close()
        return file.announcement()

    def close(self) -> None:
        """End a ``fetch`` that is under way, and free the file unless an engine loads from it."""
        with self._lock:
            self._latest += 1
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def _keep(self, file: _RoundFile, call: int) -> bool:
        with self._lock:
            if call != self._latest:
                return False
            self._file = file
            return True

    def _fill(
        self, file: _RoundFile, publication: Publication, order: Sequence[Bucket], timeout_s: float, call: int
    ) -> None:
        """Write the buckets into ``file`` in this order, and its head last."""
        deadline = time.monotonic() + timeout_s
        file.begin()
        waiting = deque([*order, publication.head])
        coming: deque[tuple[Bucket, concurrent.futures.Future[Array]]] = deque()
        missing = len(waiting)
        while missing:
            while waiting and len(coming) < _AHEAD:
                bucket = waiting.popleft()
                coming.append((bucket, self._get(bucket.reference)))
            bucket, future = coming.popleft()
            array = _result(
                future, deadline, f"{missing} of {len(order) + 1} buckets are missing after {timeout_s:g} s"
            )
            if call != self._latest:
                raise WeightSyncError("another transfer of weights to this host has begun")
            if array.nbytes != bucket.nbytes or _checksum(array) != bucket.checksum:
                raise WeightSyncError(
                    f"weights: the bucket of {bucket.nbytes} bytes at {bucket.start} of the weight file does not match "
                    "its checksum; nothing was loaded"
                )
            missing -= 1
            if bucket is publication.head:
                file.finish(array, publication.round)
            else:
                file.write(array.data, bucket.start)
            del array  # or the store could not free its copy


class _RoundFile(MemoryFile):
    """A memory file that knows which round it holds; 0 for none that is complete."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.round = 0

    def begin(self) -> None:
        """Make readers refuse the file."""
        self.round = 0
        self.write(bytes(HEAD.size), 0)

    def finish(self, head: Array, round_: int) -> None:
        """Write what precedes the tensors: the head itself last, because it says that the file is complete."""
        self.write(head.data[HEAD.size :], HEAD.size)
        self.write(head.data[: HEAD.size], 0)
        self.round = round_

    def announcement(self) -> Announcement:
        """Return what readers need in order to find the round that the file holds."""
        return self.announce(self.round)


def _checksum(array: Array) -> int:
    digest = xxhash.xxh3_64()
    digest.update(array.data)  # other threads run meanwhile, unlike with xxh3_64_intdigest
    return digest.intdigest()


def _result(future: concurrent.futures.Future[Array], deadline: float, what: str) -> Array:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except concurrent.futures.TimeoutError:
        raise WeightSyncError(f"weights did not reach this host in time: {what}; raise sync.timeout_s") from None
    except Exception as error:  # of the store: the trainer's host is gone, for example
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise WeightSyncError(f"weights could not be fetched: {why}") from error
