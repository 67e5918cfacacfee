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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import HEAD, Announcement, Layout, MemoryFile, TensorMeta

# A bucket of this size takes a tenth of a second on a 25 Gbit/s link, long against the milliseconds that the store needs
# for each object, while the copies that an end holds outside of the store stay below a gigabyte.
MAX_BUCKET_BYTES = 256 * 2**20
# A smaller model is cut into as many buckets all the same, because a host can serve only buckets that it has whole.
BUCKETS = 64
MIN_BUCKET_BYTES = 2**20
# Buckets on their way to a host at one time: the next ones travel while one is written.
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
    """The trainer's end, on rank 0: keeps the weights of one version in the store, those published last.

    ``put`` may raise; what it raises leaves ``publish`` as it is.
    """

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

        Raises WeightSyncError when they are not those of the name table, in its order.
        """
        raise NotImplementedError

    def withdraw(self) -> None:
        """Let the store free the weights, unless a host still fetches them."""
        self.current = None


class HostWeights:
    """A host's end, in one rollout worker of the host: puts publications together in a memory file for its engines."""

    def __init__(self, get: Get) -> None:
        self._get = get

    def fetch(self, publication: Publication, *, host: int, hosts: int, timeout_s: float) -> Announcement:
        """Bring ``publication`` to this host and return the announcement of its file, for ``shm_file.read``.

        ``host`` of ``hosts`` is this host's number, from 0, which says where it begins. A publication that the file has
        already is not fetched again. A later call ends one that is under way. Raises WeightSyncError when a bucket
        cannot be had within ``timeout_s`` seconds for all, or is not what was published.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End a ``fetch`` that is under way and free the file; engines that load from it keep it until they are done."""
        raise NotImplementedError
