"""Weights across hosts through an object store: cut into buckets by the trainer, put together once on each host.

    trainer rank 0      gathers, fills bucket after bucket, puts each into the store            ``Publisher``
                        or, with sync.delta, puts what has changed of them                      ``DeltaPublisher``
    a host's worker     fetches the buckets and writes them into the host's memory file        ``HostWeights``
    its engines         load from that file, as from the trainer's with sync.backend shm        ``shm_file.read``

A bucket is a stretch of the weight file's tensors (``shm_file``), whatever tensors it begins and ends in, so that
neither end ever holds more than a few buckets beside the store and the file. Each has a checksum, and each tensor has
its own in the file: the host checks the first when a bucket arrives, the engine the second before it loads.

Ray's store brings an object from one of the hosts that have it, by lot, and the trainer's always is among them. So that
its link is not what all hosts wait for, the store brings each bucket to one host, and that host serves it to the
others. Knows torch and numpy, neither Ray nor vLLM: ``put`` and ``get`` are given.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from async_rl.errors import WeightSyncError
from async_rl.weights.buckets import Array, Bucket, Publication, bucket_bytes, checksum
from async_rl.weights.host_fetch import Fetch, Get, Peer, RoundFile
from async_rl.weights.shm_file import Announcement, Layout, TensorMeta

Put = Callable[[Array], Any]
"""Stores a copy of an array of bytes and returns a reference to it, as ``ray.put`` does."""


class Publisher:
    """The trainer's end, on rank 0: keeps the weights of one version in the store, those published last."""

    def __init__(self, metas: Sequence[TensorMeta], put: Put, *, size: int | None = None) -> None:
        """Prepare for tensors of this name table. ``size`` replaces the bucket size that suits the model."""
        self._layout = Layout(metas)
        self._put = put
        self._size = size or bucket_bytes(self._layout.nbytes - self._layout.data)
        # A host tells publications apart by their round: those of two trainers of one run differ. None has 0.
        self._round = 1 + secrets.randbits(48)
        self.current: Publication | None = None
        """What was published last, if that was complete."""
        self.totals = Totals()

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], *, full: bool = False) -> Publication:
        """Put these tensors into the store in place of what was published before, and return where they are.

        ``full`` asks for all weights, as a second attempt does; this class publishes no others. Raises WeightSyncError
        when the tensors are not those of the name table, in its order, and what ``put`` raises.
        """
        del full
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
        return self._publish(filling.buckets, self._head(digests))

    def for_host(self, round_: int) -> Publication:
        """Return what a host fetches whose file holds that round, 0 for none. Raises WeightSyncError if there is none.

        The same object is returned for all hosts that fetch the same.
        """
        del round_
        if self.current is None:  # other ranks gather no more than this one does
            raise WeightSyncError("no weights are in the object store: they could not be published before")
        return self.current

    def withdraw(self) -> None:
        """Let the store free the weights, except for a host that still fetches them."""
        self.current = None

    def _publish(self, buckets: list[Bucket], head: Bucket, base: int | None = None) -> Publication:
        self.current = Publication(self._round, self._layout.nbytes, buckets, head, base)
        self.totals.add(self.current)
        return self.current

    def _head(self, digests: Sequence[int]) -> Bucket:
        return self._store(np.frombuffer(self._layout.finished(self._round, digests), dtype=np.uint8), 0)

    def _store(self, array: Array, start: int) -> Bucket:
        return Bucket(start, array.nbytes, checksum(array), self._put(array))


@dataclass(slots=True)
class Totals:
    """What a publisher has put into the store, by kind: "full" for all weights, "delta" for what has changed."""

    publications: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)
    changed: float | None = None
    """Share of elements that have other bits in the latest weights than in those before; None if not compared."""

    def add(self, publication: Publication) -> None:
        """Count a publication."""
        kind = "full" if publication.base is None else "delta"
        self.publications[kind] += 1
        self.nbytes[kind] += publication.nbytes_sent


class Staged:
    """Whether the weights published last can be sent once more, for example to a replica that joins.

    Every trainer rank has one and answers alike, whatever failed on another rank: gathering takes all of them. So it
    goes by calls that reach all ranks. To connect again to a replica that was given these weights is a second attempt.
    """

    def __init__(self) -> None:
        self._valid = False
        self._given: set[Hashable] = set()  # receivers that were connected when these weights were staged
        self._connected: set[Hashable] = set()
        self._again = False
        self.repeated = False
        """Whether the weights staged last had been given to some of their receivers before: a second attempt."""

    def connect(self, receivers: Iterable[Hashable]) -> None:
        """Note a new connection, in place of the one before."""
        self._connected = set(receivers)
        if self._connected & self._given:
            self._again |= self._valid
            self._valid = False

    def outdate(self) -> None:
        """Note that the trainer's weights change."""
        self._valid = self._again = False

    def stage(self) -> bool:
        """Note that the weights of now are staged; return whether they must be gathered for that."""
        gather = not self._valid
        self._given = set(self._connected) if gather else self._given | self._connected
        self._valid = True
        self.repeated, self._again = self._again, False
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
        self._lock = threading.Lock()  # of the three below
        self._file: RoundFile | None = None  # none while a fetch fills it
        self._fetch: Fetch | None = None  # the latest; earlier ones are stopped
        self._wanted: list[tuple[int, int, concurrent.futures.Future[None]]] = []  # round and start, by other hosts

    @property
    def round(self) -> int:
        """The round of the weights that the file has; 0 for none, also while a fetch fills it."""
        with self._lock:
            return 0 if self._file is None else self._file.round

    def fetch(
        self, publication: Publication, *, host: int, hosts: int, timeout_s: float, peers: Sequence[Peer] = ()
    ) -> Announcement:
        """Bring ``publication`` to this host and return the announcement of its file, for ``shm_file.read``.

        ``host`` of ``hosts`` is this host's number, from 0. Without ``peers`` it says where in the buckets this host
        begins, and the store may bring each from any host that has it. With them, one for each host, all of which fetch
        at the same time, this host has the store bring its share alone, and asks them for theirs; what a peer does not
        deliver comes from the store. Then the trainer's link carries each bucket once.

        A publication that the file has already is not fetched again. A later call ends one that is under way. Raises
        WeightSyncError when a bucket cannot be had within ``timeout_s`` seconds for all, or is not what was published,
        and for a delta to other weights than the file has.
        """
        fetch = Fetch(publication, self._get, timeout_s)
        with self._lock:
            if self._file is not None and self._file.round == publication.round:
                return self._file.announcement()
            file, self._file = self._file, None
            self._begin(fetch)
        try:
            if publication.base is not None and (file is None or file.round != publication.base):
                found = 0 if file is None else file.round
                raise WeightSyncError(f"weights: a delta to round {publication.base}, but this host has {found}")
            if file is not None and file.nbytes != publication.nbytes:
                file.close()
                file = None
            fetch.file = file = file or RoundFile(publication.nbytes)
            fetch.run(publication, host, hosts, peers, self._deliver)
        except BaseException:
            fetch.stopped = True
            self._deliver()
            raise
        finally:
            # Also a file that was not finished: the next round is written into the same memory.
            if file is not None and not self._keep(fetch, file):
                file.close()
        return file.announcement()

    def close(self) -> None:
        """End a ``fetch`` that is under way, and free the file unless an engine loads from it."""
        with self._lock:
            file, self._file = self._file, None
            self._begin(None)
        if file is not None:
            file.close()

    def available(self, round_: int, start: int) -> concurrent.futures.Future[None]:
        """Return a future that is done when this host can serve a bucket; it fails when this host will not have it."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._wanted.append((round_, start, future))
        self._deliver()
        return future

    def read(self, round_: int, start: int) -> Array:
        """Return a copy of a bucket that is ``available``. Raises WeightSyncError when it no longer is."""
        with self._lock:
            fetch = self._fetch
        if fetch is None or fetch.round != round_ or start not in fetch.written or fetch.file is None:
            raise WeightSyncError(f"weights: this host has no bucket at {start} of round {round_}")
        return fetch.bucket(start)

    async def serve(self, round_: int, start: int, timeout_s: float) -> Array:
        """Return a copy of a bucket, once this host has it; the answer to a ``Peer`` of another host.

        Raises WeightSyncError when this host will not have it, and TimeoutError.
        """
        await asyncio.wait_for(asyncio.wrap_future(self.available(round_, start)), timeout_s)
        return await asyncio.to_thread(self.read, round_, start)

    def _begin(self, fetch: Fetch | None) -> None:
        """Stop the fetch that is under way, for this one; the lock is held."""
        if self._fetch is not None:
            self._fetch.stopped = True
        self._fetch = fetch

    def _keep(self, fetch: Fetch, file: RoundFile) -> bool:
        with self._lock:
            if fetch is not self._fetch:
                return False
            self._file = file
            return True

    def _deliver(self) -> None:
        """Answer the hosts that wait for a bucket which this one has, or will not have."""
        with self._lock:
            wanted, self._wanted = self._wanted, []
            fetch = self._fetch
            for round_, start, future in wanted:
                if future.cancelled():  # the other host waits no longer
                    continue
                if fetch is None or fetch.round != round_ or (start not in fetch.written and not fetch.stopped):
                    self._wanted.append((round_, start, future))
                elif future.set_running_or_notify_cancel():
                    if start in fetch.written:
                        future.set_result(None)
                    else:
                        future.set_exception(WeightSyncError("this host could not fetch the weights"))
