"""Notices hosts that leave the cluster. Asks for all of them at once, however many replicas wait to know.

Ray tells a caller that a host is gone only where the caller has an actor there that had started. A worker that is being
created on a host that is gone never answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import ray
import structlog

from async_rl.runtime.failures import brief

log = structlog.get_logger(__name__)

# Ray itself takes seconds to conclude that a host is gone, up to a minute for one that is silent.
_PERIOD_S = 5.0


def hosts_alive() -> set[str]:
    """Return Ray's ids of the hosts that are part of the cluster now."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


async def _asked() -> Collection[str]:
    return await asyncio.to_thread(hosts_alive)


class HostWatch:
    """Looks at the hosts of the cluster every ``period_s`` seconds, as long as anything waits for one to leave."""

    def __init__(self, alive: Callable[[], Awaitable[Collection[str]]] = _asked, period_s: float = _PERIOD_S) -> None:
        self._alive = alive
        self._period_s = period_s
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def is_gone(self, host: str) -> bool:
        """Return whether a host is no part of the cluster any more."""
        alive = await self._seen()
        return alive is not None and host not in alive

    async def gone(self, host: str) -> None:
        """Return once a host is no part of the cluster any more."""
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(host, set()).add(left)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            await left
        finally:
            self._waiting[host].discard(left)
            if not self._waiting[host]:
                del self._waiting[host]

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._period_s)
            alive = await self._seen()
            for host in [host for host in self._waiting if alive is not None and host not in alive]:
                for left in self._waiting[host]:
                    if not left.done():
                        left.set_result(None)

    async def _seen(self) -> Collection[str] | None:
        """Return the hosts of the cluster; None if Ray does not say."""
        try:
            return await self._alive()
        except Exception as error:  # noqa: BLE001 - the cluster's head may be out of reach for a moment
            log.warning("hosts_not_seen", reason=brief(error))
            return None
