"""What an actor has that fetches weights for its host, with sync.backend object_store; ``vllm.sender`` calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_rl.weights.buckets import Array, Publication
    from async_rl.weights.object_store import HostWeights
    from async_rl.weights.shm_file import Announcement


BY_PART = "by_part"
"""In an update for an engine that spans hosts, the announcements of its hosts' files, in the order of its parts."""


def for_hosts(files: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """Return what of the announcements by host an engine takes that is on ``hosts``, its parts' in turn."""
    announcement: dict[str, Any] = files[hosts[0]]
    return announcement if len(hosts) == 1 else {BY_PART: [files[host] for host in hosts]}


class FetchesWeights:
    """Methods of an actor that fetches weights for the engines of its host, and serves them to other hosts."""

    _fetched: HostWeights | None = None

    @property
    def _host_weights(self) -> HostWeights:
        """The weights of this host; made when first needed, as it imports torch."""
        from async_rl.weights import ray_store
        from async_rl.weights.object_store import HostWeights

        if self._fetched is None:
            self._fetched = HostWeights(ray_store.get)
        return self._fetched

    async def weights_host(self) -> str:
        """Return the id of this host."""
        from async_rl.weights import ray_store

        return ray_store.host_id()

    async def weights_round(self) -> int:
        """Return the round of the weights that this actor has fetched for its host; 0 for none."""
        return self._host_weights.round

    async def free_weights(self) -> None:
        """Free the weights that an earlier sender had this actor fetch, because another one fetches for its host."""
        if self._fetched is not None:
            self._fetched.close()

    async def fetch_weights(
        self, publication: Publication, host: int, hosts: int, timeout_s: float, others: Sequence[Any]
    ) -> Announcement:
        """Bring weights to this host, for its engines, while they generate; see ``HostWeights.fetch``.

        ``others`` are the actors that do the same on each host, this one among them.
        """
        from async_rl.weights import ray_store

        peers = [ray_store.peer(actor, timeout_s) for actor in others]
        return await asyncio.to_thread(
            self._host_weights.fetch, publication, host=host, hosts=hosts, timeout_s=timeout_s, peers=peers
        )

    async def weights_bucket(self, timeout_s: float, round_: int, start: int) -> Array:
        """Serve a bucket to another host, once this one has it. Raises WeightSyncError when it will not have it."""
        return await self._host_weights.serve(round_, start, timeout_s)
