"""Keeps a copy of each finished group's message on a second host, with queue.copies 2: ``Copies``, for the driver.

    worker's host    the message, as the worker's stream returned it    payload[0]
    another host     a copy, returned by the ``CopyHolder`` there       payload[1]

The driver owns both, and lets both go with the payload. The copy is an object of its own. If it were the same object in
two places, the loss of the worker's host would take both: while the worker's stream has not ended, Ray then puts the
error of that call in the place of every value that it has returned.

Messages on the driver's host are not copied: without that host there is no run that could read them. Neither are those
that Ray keeps in the driver's process, because they are small. Copies go to the other hosts, in random order so that
each gets as many; to the driver's host only where there is no other, because its links must not carry what grows with
tokens.

Where no host can take a copy the run continues with one, and the log says so (``group_not_copied``). Neither are copies
made again when a host is lost (``copies_lost``): groups wait for minutes until they are trained. Knows Ray alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.queue.fetcher import hosts_with
from async_rl.runtime import timeouts
from async_rl.runtime.failures import brief, is_process_death

log = structlog.get_logger(__name__)

# A list of hundreds of hosts takes the driver some milliseconds, and groups are finished every few.
_HOSTS_VALID_S = 1.0
# A host whose holder has died, for example by running out of memory, or was too slow is the last to be asked for so
# long.
_AVOIDED_S = 60.0
# Messages that are copied at one time after a restart. Of groups that are being finished it is one for each worker.
_AT_ONCE = 8


class CopyHolder:
    """Copies messages into the object store of its host. Runs as an actor, one for each host."""

    async def copy(self, source: Sequence[Any]) -> tuple[Any, int]:
        """Bring a message to this host. Returns a copy and its size in bytes.

        source: [ObjectRef of the message], in a list so that Ray passes the reference on instead of the object.
        """
        message = await source[0]
        return message, message.nbytes


class _Hosts(NamedTuple):
    """Hosts of the cluster, by Ray's id."""

    alive: frozenset[str]
    usable: frozenset[str]
    """Those of them that have what processes of the run take; the others may lack its code."""


class Copies:
    """Makes the copies of the groups of one queue. Payloads are lists of references, to which copies are appended."""

    def __init__(self, device: str) -> None:
        """``device``: cpu or cuda, which copies go to hosts with."""
        self._resource = "GPU" if device == "cuda" else "CPU"
        self._here = ray.get_runtime_context().get_node_id()
        self._hosts = _Hosts(frozenset(), frozenset())
        self._looked = -math.inf
        self._looking = asyncio.Lock()
        self._holders: dict[str, Any] = {}  # by host
        self._avoided: dict[str, float] = {}  # {host: until when}
        self._random = random.Random()

    async def add(self, group_id: str, payload: list[Any]) -> None:
        """Append a copy to ``payload``, and return once it exists; do nothing where no second host is needed."""
        if (hosts := await self._wanted(payload)) is not None:
            await self._copy(group_id, payload, hosts)

    async def add_all(self, payloads: Mapping[str, Any]) -> None:
        """Append a copy to each payload that needs one, some at a time."""
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def add(group_id: str, payload: list[Any]) -> None:
            async with at_once:
                await self.add(group_id, payload)

        lists = [(group_id, payload) for group_id, payload in payloads.items() if isinstance(payload, list)]
        await asyncio.gather(*(add(group_id, payload) for group_id, payload in lists))

    async def _wanted(self, payload: Sequence[Any]) -> frozenset[str] | None:
        """Return the hosts to which a copy may go; None if none is wanted, or the message is lost."""
        hosts = await self._look()
        there = hosts.alive.intersection((await asyncio.to_thread(hosts_with, payload[:1]))[payload[0]])
        if len(payload) > 1 or not there or self._here in there:
            return None
        return (hosts.usable | {self._here}) - there

    async def _copy(self, group_id: str, payload: list[Any], hosts: frozenset[str]) -> None:
        """Append a copy on one of ``hosts``; if none can make it, log that."""
        reason = "no host takes it"
        for host in self._in_order(hosts):
            if (holder := self._holders.get(host)) is None:
                holder = self._holders[host] = _start_holder(host)
            copy, size = holder.copy.options(num_returns=2).remote(payload[:1])
            try:
                async with asyncio.timeout(timeouts.PAYLOAD_S):
                    await size  # awaiting the copy would bring it to this process
            except RayError as error:
                if not is_process_death(error):
                    reason = brief(error)
                    break  # the message is lost: no other host would get it either
                log.warning("copy_holder_died", host=host, reason=brief(error))
                self._avoid(host)
                if self._holders.get(host) is holder:
                    del self._holders[host]
            except TimeoutError:
                reason = f"it did not come to host {host} within {timeouts.PAYLOAD_S:g} s"
                self._avoid(host)
                break  # the queue waits for the group
            else:
                payload.append(copy)
                return
        log.warning("group_not_copied", group=group_id, reason=reason)

    def _avoid(self, host: str) -> None:
        self._avoided[host] = time.monotonic() + _AVOIDED_S

    def _in_order(self, hosts: frozenset[str]) -> list[str]:
        """Return hosts in the order in which they are asked for a copy."""
        now = time.monotonic()
        shuffled = self._random.sample(sorted(hosts), len(hosts))
        return sorted(shuffled, key=lambda host: (self._avoided.get(host, -math.inf) > now, host == self._here))

    async def _look(self) -> _Hosts:
        """Return the hosts that Ray takes for alive, and log how many of before it no longer does."""
        async with self._looking:
            if time.monotonic() - self._looked >= _HOSTS_VALID_S:
                hosts = await asyncio.to_thread(_hosts, self._resource)
                if lost := self._hosts.alive - hosts.alive:
                    log.warning("copies_lost", hosts=len(lost))
                self._hosts, self._looked = hosts, time.monotonic()
        return self._hosts


def _hosts(resource: str) -> _Hosts:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return _Hosts(
        frozenset(node["NodeID"] for node in alive),
        frozenset(node["NodeID"] for node in alive if node["Resources"].get(resource)),
    )


def _start_holder(host: str) -> Any:
    return _HOLDER.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)).remote()


# Made once: Ray keeps every remote class that is ever used.
_HOLDER = ray.remote(num_cpus=0)(CopyHolder)
