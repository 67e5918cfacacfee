"""Checks the hosts that join the cluster of a run later, each once, before a replica starts there.

The hosts that are there when a run starts are checked by ``driver.hosts``, and a run does not start with one that lacks
something. One that joins later must not end the run: it is named in the log (``host_unfit``), and gets no replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import structlog

from async_rl.config.schema import RunConfig
from async_rl.doctor import cluster
from async_rl.driver.hosts import Survey, surveyed
from async_rl.runtime.failures import brief

log = structlog.get_logger(__name__)

# Ray gives each node a label with its id.
_NODE_ID_LABEL = "ray.io/node-id"


class Newcomers:
    """Knows which hosts may have replicas; ``known`` are the ids of those that were there when the run started."""

    def __init__(
        self,
        config: RunConfig,
        known: Collection[str],
        survey: Callable[[RunConfig, Collection[str]], Survey] = surveyed,
    ) -> None:
        self._config = config
        self._known = frozenset(known)
        self._survey = survey
        self._checks: dict[str, asyncio.Future[bool]] = {}  # by host

    async def fits(self, host: str) -> bool:
        """Return whether replicas may be on a host. Asks it what it has, unless that was done."""
        if host in self._known:
            return True
        if host not in self._checks:
            self._checks[host] = asyncio.ensure_future(self._check(host))
        return await asyncio.shield(self._checks[host])  # others wait for it too

    async def _check(self, host: str) -> bool:
        try:
            survey = await asyncio.to_thread(self._survey, self._config, [host])
        except Exception as error:  # noqa: BLE001 - the run continues with the hosts that it has
            log.warning("host_unfit", host=host, reason=f"it could not be checked: {brief(error)}")
            return False
        for report in survey.hosts:  # none if it has left meanwhile
            if (lack := cluster.lack(self._config, report, survey.own)) is not None:
                log.warning("host_unfit", host=report.name, reason=f"{lack.name}: {lack.detail}; {lack.fix}")
                return False
        return True

    def selectors(self, bundles: int) -> list[dict[str, str]] | None:
        """Return the selectors of nodes for a placement group, by which none of its bundles comes to an unfit host."""
        unfit = sorted(host for host, check in self._checks.items() if _is_unfit(check))
        return [{_NODE_ID_LABEL: f"!in({','.join(unfit)})"}] * bundles if unfit else None


def _is_unfit(check: asyncio.Future[bool]) -> bool:
    return check.done() and not check.cancelled() and not check.result()
