"""The buckets that weights travel in through an object store: how large they are, and which a host fetches when.

Pure: knows arrays of bytes and references to them, which mean something to the store alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

# Takes a tenth of a second on a link of 25 Gbit/s, long against the milliseconds that the store needs for each object,
# while what an end holds of them at one time stays below a gigabyte.
MAX_BUCKET_BYTES = 256 * 2**20
# A smaller model is cut into as many buckets all the same, because a host can serve only buckets that it has whole.
BUCKETS = 64
MIN_BUCKET_BYTES = 2**20
# A delta has buckets that are smaller in proportion, so that hosts share it as evenly as they share all weights.
DELTA_BUCKET_SHARE = 1 / 16

Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One stretch of the weight file, or of a delta to one."""

    start: int
    """Where it begins in the file, or in the delta."""
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
    """The file's tensors, in order and without gaps; of a delta, what has changed of them, in blocks of ``delta``."""
    head: Bucket
    """The file's head, table and digests, which make it a finished file."""
    base: int | None = None
    """The round of the weights that a delta changes; None for all weights."""

    @property
    def nbytes_sent(self) -> int:
        """Bytes in the store."""
        return self.head.nbytes + sum(bucket.nbytes for bucket in self.buckets)


def bucket_bytes(nbytes: int) -> int:
    """Return the size of each bucket, the last one apart, for ``nbytes`` of tensors."""
    wanted = min(max(nbytes // BUCKETS, MIN_BUCKET_BYTES), MAX_BUCKET_BYTES)
    return -(-wanted // 64) * 64


def delta_bucket_bytes(nbytes: int) -> int:
    """Return the size at which a bucket of a delta to ``nbytes`` of tensors is full."""
    return max(int(bucket_bytes(nbytes) * DELTA_BUCKET_SHARE), MIN_BUCKET_BYTES)


def rotated(buckets: Sequence[Bucket], host: int, hosts: int) -> list[Bucket]:
    """Return the buckets in the order in which host number ``host`` of ``hosts`` fetches them."""
    begin = len(buckets) * host // hosts
    return [*buckets[begin:], *buckets[:begin]]


def shares(buckets: Sequence[Bucket], host: int, hosts: int) -> tuple[list[Bucket], list[tuple[int, Bucket]]]:
    """Return the share of host number ``host`` of ``hosts``, and the other buckets, each with the host whose it is.

    Bucket b is of the share of host b % hosts. The others are in the order in which this host asks for them: in turn,
    beginning with the next host, so that no two ask the same one while all are equally fast.
    """
    others = []
    for first in range(0, len(buckets), hosts):
        for step in range(1, hosts):
            owner = (host + step) % hosts
            if first + owner < len(buckets):
                others.append((owner, buckets[first + owner]))
    return list(buckets[host::hosts]), others


def checksum(array: Array) -> int:
    """Return the xxh3_64 of the bytes of ``array``."""
    digest = xxhash.xxh3_64()
    digest.update(array.data)  # other threads run meanwhile, unlike with xxh3_64_intdigest
    return digest.intdigest()
