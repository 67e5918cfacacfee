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

When a host is lost, what it leaves with one copy is copied again (``copies_lost``). Where each copy lies is noted when
it is made, because Ray does not tell it afterwards: it puts the error of a lost value into the store of the value's
owner, so that the value seems to be on the driver's host, and of a value that it has written to disk it names no place.

Every wait for Ray has a time limit. Where no host takes a copy in time the run continues with one, and the log says so
(``group_not_copied``). Knows Ray alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.queue.fetcher import own_place
from async_rl.runtime import timeouts
from async_rl.runtime.failures import brief, is_process_death

log = structlog.get_logger(__name__)

# A list of hundreds of hosts takes the driver some milliseconds, and groups are finished every few.
_HOSTS_VALID_S = 1.0
# How often lost hosts are looked for. Ray itself takes seconds to conclude that a host is gone, up to a minute for one
# that is silent.
_PERIOD_S = 5.0
# Up to this size Ray keeps a message in the process that owns it (its max_direct_call_object_size).
_SMALL_BYTES = 100 * 2**10
# How long Ray may take to say where a larger one is, and how often it is asked. One that is lost has no place either.
_PLACED_S = 2.0
_LOOK_S = 0.01
# A host whose holder has died, for example by running out of memory, or was too slow is the last to be asked for so
# long.
_AVOIDED_S = 60.0
# Messages that are copied at one time after a restart or the loss of a host. Groups that are being finished are besides
# these, at most one for each worker.
_AT_ONCE = 8


class CopyHolder:
    """Copies messages into the object store of its host. Runs as an actor, one for each host."""

    async def copy(self, source: Sequence[Any]) -> tuple[Any, int]:
        """Bring a message to this host. Returns a copy and its size in bytes.

        source: [ObjectRef of the message], in a list so that Ray passes the reference on instead of the object. Raises
        TimeoutError for a message that does not come: the wait would keep it from being let go.
        """
        async with asyncio.timeout(timeouts.PAYLOAD_S):
            message = await source[0]
        return message, message.nbytes


class _Hosts(NamedTuple):
    """Hosts of the cluster, by Ray's id."""

    alive: frozenset[str]
    usable: frozenset[str]
    """Those of them that have what processes of the run take; the others may lack its code."""


class _Copy(NamedTuple):
    reference: Any
    host: str


class _Kept(NamedTuple):
    """A payload of two references, and the host of each."""

    payload: list[Any]
    hosts: list[str]


class Copies:
    """Makes the copies of the groups of one queue, and makes them again when hosts are lost.

    Payloads are lists of references, to which copies are appended. What is made again takes the place of what was lost.
    """

    def __init__(self, device: str) -> None:
        """``device``: cpu or cuda, which copies go to hosts with."""
        self._resource = "GPU" if device == "cuda" else "CPU"
        self._here = ray.get_runtime_context().get_node_id()
        self._hosts = _Hosts(frozenset(), frozenset())
        self._looked = -math.inf
        self._looking: asyncio.Future[_Hosts] | None = None
        self._holders: dict[str, Any] = {}  # by host
        self._avoided: dict[str, float] = {}  # {host: until when}
        self._random = random.Random()
        self._kept: dict[str, _Kept] = {}  # by group id
        self._watching: asyncio.Future[None] | None = None

    async def add(self, group_id: str, payload: list[Any]) -> None:
        """Append a copy to ``payload``, and return once it exists; do nothing where no second host is needed.

        The copy is made again when a host is lost, until ``forget`` is called.
        """
        hosts = await self._look()
        there = hosts.alive.intersection(await _hosts_of(payload[0]))
        if len(payload) > 1 or not there or self._here in there:
            return
        copy = await self._copied(group_id, payload[0], (hosts.usable | {self._here}) - there)
        if copy is None:
            return
        payload.append(copy.reference)
        # It has come from its worker and has had no reader, so that it is on one host.
        self._kept.setdefault(group_id, _Kept(payload, [min(there), copy.host]))
        if self._watching is None or self._watching.done():
            self._watching = asyncio.ensure_future(self._watch())

    async def add_all(self, payloads: Mapping[str, Any]) -> None:
        """Append a copy to each payload that needs one, some at a time."""
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def add(group_id: str, payload: list[Any]) -> None:
            async with at_once:
                await self.add(group_id, payload)

        lists = [(group_id, payload) for group_id, payload in payloads.items() if isinstance(payload, list)]
        await asyncio.gather(*(add(group_id, payload) for group_id, payload in lists))

    def forget(self, group_ids: Iterable[str]) -> None:
        """Let the payloads of groups go that have ended, if there are any."""
        for group_id in group_ids:
            self._kept.pop(group_id, None)

    async def _watch(self) -> None:
        """Make lost copies again, for as long as there is a group with two."""
        while self._kept:
            await asyncio.sleep(_PERIOD_S)
            await self._renew()

    async def _renew(self) -> None:
        """Make the copies again that were on lost hosts, some at a time."""
        alive, at_once = (await self._look()).alive, asyncio.Semaphore(_AT_ONCE)
        short = {group_id: kept for group_id, kept in self._kept.items() if not alive.issuperset(kept.hosts)}
        if not short:
            return
        lost = {host for kept in short.values() for host in kept.hosts} - alive

        async def renewed(group_id: str) -> bool | None:
            async with at_once:
                return await self._renewed(group_id)

        results = await asyncio.gather(*map(renewed, short))
        if groups := sum(result is not None for result in results):
            log.warning("copies_lost", hosts=len(lost), groups=groups, copied=results.count(True))

    async def _renewed(self, group_id: str) -> bool | None:
        """Make the lost copy of a group again. Returns whether that was possible, else it is not tried again.

        None if no copy is wanted: of a group that has ended, is lost (its reader finds that), or is on this host.
        """
        hosts = await self._look()
        if (kept := self._kept.get(group_id)) is None:
            return None
        left = [index for index, host in enumerate(kept.hosts) if host in hosts.alive]
        if len(left) != 1 or kept.hosts[left[0]] == self._here:
            self.forget([group_id])
            return None
        source, gone = left[0], 1 - left[0]
        others = (hosts.usable | {self._here}) - {kept.hosts[source]}
        copy = await self._copied(group_id, kept.payload[source], others)
        if self._kept.get(group_id) is not kept:
            return None
        if copy is None:
            self.forget([group_id])
            return False
        kept.payload[gone], kept.hosts[gone] = copy
        return True

    async def _copied(self, group_id: str, source: Any, hosts: frozenset[str]) -> _Copy | None:
        """Return a copy on one of ``hosts`` of what the reference ``source`` is to; if none can make it, log that."""
        reason = "no host takes it"
        for host in self._in_order(hosts):
            holder = self._holders.get(host)
            try:
                if holder is None:
                    holder = self._holders[host] = _start_holder(host)
                copy, size = holder.copy.options(num_returns=2).remote([source])
                async with asyncio.timeout(timeouts.PAYLOAD_S):
                    await size  # awaiting the copy would bring it to this process
                return _Copy(copy, host)
            except TimeoutError:  # of this wait, or of the holder's own
                reason = f"it did not come to host {host} within {timeouts.PAYLOAD_S:g} s"
                self._avoid(host)
                break  # the queue waits for the group
            except Exception as error:  # noqa: BLE001 - whatever it is, the run continues with one copy
                if not is_process_death(error):
                    reason = brief(error)
                    break  # the message is lost: no other host would get it either
                log.warning("copy_holder_died", host=host, reason=brief(error))
                self._avoid(host)
                if self._holders.get(host) is holder:
                    del self._holders[host]
        log.warning("group_not_copied", group=group_id, reason=reason)
        return None

    def _avoid(self, host: str) -> None:
        self._avoided[host] = time.monotonic() + _AVOIDED_S

    def _in_order(self, hosts: frozenset[str]) -> list[str]:
        """Return hosts in the order in which they are asked for a copy."""
        now = time.monotonic()
        shuffled = self._random.sample(sorted(hosts), len(hosts))
        return sorted(shuffled, key=lambda host: (self._avoided.get(host, -math.inf) > now, host == self._here))

    async def _look(self) -> _Hosts:
        """Return the hosts that Ray takes for alive; those of before where it does not say in time."""
        if self._looking is None and time.monotonic() - self._looked >= _HOSTS_VALID_S:
            self._looking = asyncio.ensure_future(asyncio.to_thread(_hosts, self._resource))
            self._looking.add_done_callback(self._seen)
        if self._looking is not None:
            # It is not cancelled at the end of this wait: its thread would go on, and each call would add another one.
            await asyncio.wait({self._looking}, timeout=timeouts.ANSWER_S)
        return self._hosts

    def _seen(self, looking: asyncio.Future[_Hosts]) -> None:
        self._looking, self._looked = None, time.monotonic()
        if looking.cancelled():
            return
        if (error := looking.exception()) is not None:
            log.warning("hosts_not_seen", reason=brief(error))
        else:
            self._hosts = looking.result()


async def _hosts_of(message: Any) -> Sequence[str]:
    """Return the hosts whose object store has a message of this process; none for one that is lost, small, or on disk.

    Of a message that has just come Ray knows the size, and its place some milliseconds later.
    """
    began = time.monotonic()
    while True:
        place = own_place(message)
        known = place.hosts or place.on_disk or place.nbytes <= _SMALL_BYTES
        if known or time.monotonic() - began > _PLACED_S:
            return place.hosts
        await asyncio.sleep(_LOOK_S)


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
