"""The trainer's end of ``object_store`` with sync.delta: publishes what has changed, and all weights where need be.

It keeps a copy of the weights that it published last, in the type that is sent and in this host's memory. A delta is to
those alone, so the round that a host has says whether it can take one. All weights are put into the store from the copy
once they are needed: for every host at the first publication, at each ``full_every``-th, at a second attempt and when a
delta would be too large; else for a host that has other weights, such as one that joins. Both make the same file.

Knows torch and numpy, neither Ray nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import structlog
import torch
import xxhash

from async_rl.weights import delta
from async_rl.weights.buckets import Array, Bucket, Publication, delta_bucket_bytes
from async_rl.weights.object_store import Publisher, Put
from async_rl.weights.shm_file import TensorMeta

log = structlog.get_logger(__name__)


class DeltaPublisher(Publisher):
    """A ``Publisher`` of deltas; of ``full_every`` publications one has all weights.

    ``max_ratio``: above this share of the weights' bytes all weights are published instead of a delta.
    """

    def __init__(
        self,
        metas: Sequence[TensorMeta],
        put: Put,
        *,
        full_every: int,
        max_ratio: float,
        size: int | None = None,
        block: int = delta.BLOCK_BYTES,
    ) -> None:
        super().__init__(metas, put, size=size)
        weights = self._layout.nbytes - self._layout.data
        self._full_every, self._most = full_every, int(max_ratio * weights)
        self._delta_size = size or delta_bucket_bytes(weights)
        self._block = block
        self._copy: Array = np.zeros(weights, dtype=np.uint8)
        self._copied = 0  # the round of which all is in the copy
        self._since_full = 0
        self._last_head: Bucket | None = None
        self._full: Publication | None = None  # of the current round, beside a delta
        # Page-locked, a copy from a GPU is several times as fast.
        self._staging = torch.empty(block, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], *, full: bool = False) -> Publication:
        """Publish what these tensors have changed, or all of them; see ``Publisher.publish``."""
        self.withdraw()
        base, self._copied = self._copied, 0
        self._round += 1
        self._since_full += 1
        full = full or base == 0 or self._since_full >= self._full_every
        filling = None if full else _Blocks(self._delta_size, self._most, self._store)
        digests, changed, elements = [], 0, 0
        for tensor, meta, offset in self._layout.checked(tensors):
            digest, count = self._take(tensor, meta, offset, filling)
            digests.append(digest)
            changed += count
            elements += meta.nbytes // delta.width_of(tensor.element_size())
        self._copied = self._round
        self.totals.changed = changed / elements if base and elements else None
        self._last_head = self._head(digests)
        buckets = None if filling is None else filling.finish()
        if buckets is None:
            self._since_full = 0
            published = self._publish_full()
        else:
            published = self._publish(buckets, self._last_head, base)
        log.info("weights_published", nbytes=published.nbytes_sent, full=buckets is None, changed=self.totals.changed)
        return published

    def for_host(self, round_: int) -> Publication:
        current = super().for_host(round_)
        if current.base is None or round_ in (current.base, current.round):
            return current
        if self._full is None:
            self._full = self._publish_full()
            self.current = current
        return self._full

    def withdraw(self) -> None:
        super().withdraw()
        self._full = self._last_head = None

    def _take(self, tensor: torch.Tensor, meta: TensorMeta, offset: int, filling: _Blocks | None) -> tuple[int, int]:
        """Copy a tensor, and fill in what of it has changed. Returns its xxh3_64, and how many elements have."""
        width = delta.width_of(tensor.element_size())
        digest, changed = xxhash.xxh3_64(), 0
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if meta.nbytes else torch.empty(0)
        for start in range(0, meta.nbytes, self._block):
            part = flat[start : start + self._block]
            staged = self._staging[: len(part)]
            staged.copy_(part)
            new: Array = staged.numpy()
            digest.update(new.data)
            old = self._copy[offset + start : offset + start + len(new)]
            where = delta.changed(old, new, width)
            if len(where):
                changed += len(where)
                if filling is not None and not filling.too_many:
                    filling.append(delta.encode(new, where, width, self._layout.data + offset + start))
                old[:] = new
        return digest.intdigest(), changed

    def _publish_full(self) -> Publication:
        assert self._last_head is not None  # the copy is whole
        buckets = [
            self._store(self._copy[start : start + self._size], self._layout.data + start)
            for start in range(0, len(self._copy), self._size)
        ]
        return self._publish(buckets, self._last_head)


class _Blocks:
    """Puts blocks into buckets of about ``size`` bytes, each of whole blocks, until they have more than ``most``."""

    def __init__(self, size: int, most: int, store: Callable[[Array, int], Bucket]) -> None:
        self._size, self._most, self._store = size, most, store
        self._blocks: list[bytes] = []
        self._filled = self._total = 0
        self._buckets: list[Bucket] = []

    @property
    def too_many(self) -> bool:
        """Whether the blocks have more than ``most`` bytes."""
        return self._total > self._most

    def append(self, block: bytes) -> None:
        """Append a block. When they are too many, those before are let go."""
        self._filled += len(block)
        self._total += len(block)
        self._blocks.append(block)
        if self.too_many:
            self._blocks, self._buckets = [], []
        elif self._filled >= self._size:
            self._flush()

    def finish(self) -> list[Bucket] | None:
        """Return the buckets; None if the blocks are too many."""
        if self.too_many:
            return None
        if self._blocks:
            self._flush()
        return self._buckets

    def _flush(self) -> None:
        array = np.frombuffer(b"".join(self._blocks), dtype=np.uint8)
        self._buckets.append(self._store(array, self._total - self._filled))
        self._blocks, self._filled = [], 0
