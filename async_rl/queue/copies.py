"""Keeps a copy of each finished group's message on a second host, with queue.copies 2: ``Copies``, for the driver.

    worker's host    message of the group, in its object store      ◄── the reference that the driver owns
    another host     the same message, held there by a ``CopyHolder``

It is a copy of the same object, which Ray made for the holder to read it, and which stays for as long as the holder
looks at it. So Ray knows both places. Readers fetch from either, and when the first host dies Ray makes the other copy
the message. No reader knows of copies.

Messages that are on the driver's host are not copied: if it dies there is no run that could read them. Nor are small
ones, which Ray keeps in the driver's process. A copy that is lost is not made again: the groups wait for minutes.

Knows Ray alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.runtime import timeouts
from async_rl.runtime.failures import brief, is_process_death

log = structlog.get_logger(__name__)


class CopyHolder:
    """Holds messages in the object store of its host. Runs as an actor, one for each host."""

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._held: dict[str, Any] = {}

    async def hold(self, group_id: str, payload: list[Any]) -> None:
        """Bring a message to this host, and hold it until ``drop``."""
        self._wanted.add(group_id)
        message = await payload[0]
        if group_id in self._wanted:  # else it was dropped meanwhile
            self._held[group_id] = message

    async def drop(self, group_ids: list[str]) -> None:
        """Let messages go."""
        self._wanted.difference_update(group_ids)
        for group_id in group_ids:
            self._held.pop(group_id, None)


class Copies:
    """The copies of the groups of one queue."""

    def __init__(self) -> None:
        self._here = ray.get_runtime_context().get_node_id()
        self._holders: dict[str, Any] = {}  # by host
        self._hosts: dict[str, str] = {}  # {group id: host of its copy}
        self._warned = False

    async def add(self, group_id: str, reference: Any) -> None:
        """Copy the message of a group to another host, and return once it is there.

        Where no other host can hold it the group has one copy, which is logged.
        """
        if group_id in self._hosts:
            return
        places = await asyncio.to_thread(_places, reference)
        if not places or self._here in places:
            return
        hosts = [host for host in await asyncio.to_thread(_alive) if host not in places]
        if not hosts and not self._warned:
            self._warned = True
            log.warning("groups_have_one_copy", reason="queue.copies is 2, but no other host of the cluster is alive")
        held = Counter(self._hosts.values())
        for host in sorted(hosts, key=lambda host: held[host]):
            error = await self._try(host, group_id, reference)
            if error is None:
                return
            log.warning("group_not_copied", group=group_id, host=host, reason=brief(error))
            if not is_process_death(error):
                return  # the message is lost or does not come: another host would not get it either

    def drop(self, group_ids: Iterable[str]) -> None:
        """Let the copies of groups go. Does not wait."""
        by_host: dict[str, list[str]] = {}
        for group_id in group_ids:
            if (host := self._hosts.pop(group_id, None)) is not None:
                by_host.setdefault(host, []).append(group_id)
        for host, dropped in by_host.items():
            if (holder := self._holders.get(host)) is not None:
                holder.drop.remote(dropped)

    async def _try(self, host: str, group_id: str, reference: Any) -> Exception | None:
        """Have a host hold the message; return why it does not."""
        if host not in self._holders:
            self._holders[host] = _start_holder(host)
        self._hosts[group_id] = host
        try:
            # In a list, so that Ray passes the reference on instead of the message.
            await asyncio.wait_for(self._holders[host].hold.remote(group_id, [reference]), timeouts.PAYLOAD_S)
        except (RayError, TimeoutError) as error:
            self.drop([group_id])
            if is_process_death(error):
                self._holders.pop(host, None)
            return error
        return None


def _places(reference: Any) -> list[str]:
    """Return the hosts whose object store has the value; none for a value that is in this process."""
    found: list[str] = ray.experimental.get_object_locations([reference])[reference]["node_ids"]
    return found


def _alive() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def _start_holder(host: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(host, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(CopyHolder).remote()
