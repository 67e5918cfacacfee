"""Brings the buckets of one publication to a host, from the store and from other hosts, into a memory file.

The part of ``object_store.HostWeights`` that waits. Knows neither Ray nor vLLM.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import structlog

from async_rl.errors import WeightSyncError
from async_rl.weights import delta
from async_rl.weights.buckets import Array, Bucket, Publication, checksum, rotated, shares
from async_rl.weights.shm_file import HEAD, Announcement, MemoryFile

log = structlog.get_logger(__name__)

# Buckets on their way to a host at one time: others travel while one is checked and written.
_AHEAD = 3
# How often a wait for a bucket looks whether it was superseded; nothing that must be quick depends on it.
_LOOK_S = 0.2


Get = Callable[[Any], "concurrent.futures.Future[Array]"]
"""Begins to fetch what a reference stands for, as ``ray.ObjectRef.future`` does."""
Peer = Callable[[int, int], "concurrent.futures.Future[Array]"]
"""Asks another host for a bucket, by its publication's round and its start. The future fails if that host has none."""

# A bucket, and the call that asks for it.
_Ask = tuple[Bucket, Callable[[], "concurrent.futures.Future[Array]"]]


class RoundFile(MemoryFile):
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

    def read(self, position: int, count: int) -> Array:
        """Return a copy of ``count`` bytes from ``position`` on. Raises OSError."""
        return np.frombuffer(os.pread(self.fd, count, position), dtype=np.uint8)

    def mapped(self) -> Array:
        """Return the file as memory uint8[n] that can be written."""
        return np.frombuffer(mmap.mmap(self.fd, self.nbytes), dtype=np.uint8)

    def announcement(self) -> Announcement:
        """Return what readers need in order to find the round that the file holds."""
        return self.announce(self.round)


class Fetch:
    """One publication on its way into a file. Keeps no reference to what is in the store, once it has run."""

    def __init__(self, publication: Publication, get: Get, timeout_s: float) -> None:
        self.round = publication.round
        self.sizes = {bucket.start: bucket.nbytes for bucket in publication.buckets}
        self.written: set[int] = set()
        """Starts of the buckets that the file has."""
        self.stopped = False
        """Superseded, or failed."""
        self.file: RoundFile | None = None
        self._is_delta = publication.base is not None
        self._memory: Array | None = None  # the file, while a delta is applied to it
        self._served: dict[int, Array] = {}  # buckets of a delta that other hosts ask this one for, by their starts
        self._get = get
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def run(
        self, publication: Publication, host: int, hosts: int, peers: Sequence[Peer], written: Callable[[], None]
    ) -> None:
        """Fetch all buckets into ``file``, and call ``written`` after each; see ``HostWeights.fetch``."""
        self._file().begin()
        if self._is_delta:
            self._memory = self._file().mapped()
        own = rotated(publication.buckets, host, hosts)
        others: list[tuple[int, Bucket]] = []
        if peers:
            own, others = shares(publication.buckets, host, hosts)
        try:
            self._both(own, others, peers, written)
        finally:
            self._memory = None  # ends the mapping, which an exception would keep through the frames that it knows
        self._file().finish(self._checked(publication.head, self._get(publication.head.reference)), self.round)

    def _both(
        self,
        own: Sequence[Bucket],
        others: Sequence[tuple[int, Bucket]],
        peers: Sequence[Peer],
        written: Callable[[], None],
    ) -> None:
        """Fetch this host's ``own`` buckets from the store, and ``others`` from the peers of these numbers."""
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            # Both at the same time: the trainer's link carries this host's share while peers send theirs.
            from_peers = beside.submit(
                self._stream,
                [(bucket, partial(peers[owner], self.round, bucket.start)) for owner, bucket in others],
                written,
                instead=self._get,
            )
            try:
                asks = [(bucket, partial(self._get, bucket.reference)) for bucket in own]
                self._stream(asks, written, serve=self._is_delta and bool(peers))
                from_peers.result()
            except BaseException:
                self.stopped = True
                raise

    def _stream(
        self,
        asks: Sequence[_Ask],
        written: Callable[[], None],
        *,
        instead: Get | None = None,
        serve: bool = False,
    ) -> None:
        """Ask for these buckets in order, a few at one time, and write them; ``instead`` for those that fail.

        ``serve``: whether to keep them for other hosts, because they are not in the file as they are.
        """
        waiting = deque(asks)
        coming: deque[tuple[Bucket, concurrent.futures.Future[Array]]] = deque()
        while waiting or coming:
            while waiting and len(coming) < _AHEAD:
                bucket, ask = waiting.popleft()
                coming.append((bucket, ask()))
            bucket, future = coming.popleft()
            try:
                array = self._checked(bucket, future)
            except WeightSyncError as error:
                if instead is None or self.stopped or time.monotonic() > self._deadline:
                    self.stopped = True  # the other stream, too
                    raise
                log.warning("weights_not_from_peer", bucket=bucket.start, reason=str(error))
                array = self._checked(bucket, instead(bucket.reference))
            if serve:
                self._served[bucket.start] = array.copy()
            if self._memory is None:
                self._file().write(array.data, bucket.start)
            else:
                delta.apply(array, self._memory)
            del array, future  # or the store could not free its copy
            self.written.add(bucket.start)
            written()

    def bucket(self, start: int) -> Array:
        """Return a bucket that is ``written``, for another host. Raises OSError, and KeyError for one of a delta."""
        return self._served[start] if self._is_delta else self._file().read(start, self.sizes[start])

    def _file(self) -> RoundFile:
        assert self.file is not None  # the caller has set it
        return self.file

    def _checked(self, bucket: Bucket, future: concurrent.futures.Future[Array]) -> Array:
        """Wait for a bucket and compare it with what was published. Raises WeightSyncError."""
        array = self._result(future)
        if array.nbytes != bucket.nbytes or checksum(array) != bucket.checksum:
            raise WeightSyncError(
                f"weights: the bucket of {bucket.nbytes} bytes at {bucket.start} of the weight file does not match its "
                "checksum; nothing was loaded"
            )
        return array

    def _result(self, future: concurrent.futures.Future[Array]) -> Array:
        while not self.stopped and (left := self._deadline - time.monotonic()) > 0:
            try:
                return future.result(timeout=min(left, _LOOK_S))
            except concurrent.futures.TimeoutError:
                continue
            except Exception as error:  # of the store: the trainer's host is gone, for example
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                raise WeightSyncError(f"weights could not be fetched: {why}") from error
        if self.stopped:
            raise WeightSyncError("the transfer of weights to this host was ended: another has begun, or a part failed")
        missing = len(self.sizes) + 1 - len(self.written)
        raise WeightSyncError(
            f"weights did not reach this host in time: {missing} of {len(self.sizes) + 1} buckets are missing after "
            f"{self._timeout_s:g} s; raise sync.timeout_s"
        )
