"""Reads the messages of finished groups: ``Fetcher``, for the trainer's ranks and for what the driver shows of groups.

A message lies in the object store of the host whose worker finished the group, or in Redis. It is lost with that host
unless there is a copy on another one, or when another client has deleted it in Redis. That is no failure of the reader:
it learns which groups are lost, and the queue issues their prompts again.

Of a message with copies one is read: that of this host, or else the first. The next follows only if that one is lost.

Knows Ray and the codec; not the queue's process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError

from async_rl.config.schema import RunConfig
from async_rl.errors import PayloadLost
from async_rl.queue.client import Payload, open_groups
from async_rl.queue.codec import decode
from async_rl.queue.records import Excerpt
from async_rl.runtime import timeouts
from async_rl.runtime.failures import is_object_lost
from async_rl.types import Group

if TYPE_CHECKING:
    from async_rl.queue.redis_store import RedisGroups


class Fetcher:
    """Reads the messages of leased groups. Payloads are given by group id."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._groups: RedisGroups | None = None
        self._held: dict[str, Any] = {}  # messages by group id

    def hold(self, payloads: Mapping[str, Payload]) -> list[str]:
        """Read messages, and keep them until they are asked for. Returns the ids of the groups whose message is lost.

        Messages that an earlier call has kept, and that are not among these, are let go.
        """
        self._held = {group_id: message for group_id, message in self._held.items() if group_id in payloads}
        self._held |= self._read({i: payload for i, payload in payloads.items() if i not in self._held})
        return [group_id for group_id in payloads if group_id not in self._held]

    def messages(self, payloads: Mapping[str, Payload]) -> dict[str, Any]:
        """Return the encoded groups by id; those in the object store as views on it.

        What ``hold`` has kept of them is kept no longer. Raises PayloadLost.
        """
        found = {group_id: self._held.pop(group_id) for group_id in payloads if group_id in self._held}
        found |= self._read({group_id: payload for group_id, payload in payloads.items() if group_id not in found})
        if lost := [group_id for group_id in payloads if group_id not in found]:
            raise PayloadLost(lost)
        return {group_id: found[group_id] for group_id in payloads}

    def groups(self, payloads: Mapping[str, Payload]) -> list[Group]:
        """Return the decoded groups; their arrays are views on the messages. Raises PayloadLost."""
        return [decode(message) for message in self.messages(payloads).values()]

    def excerpts(self, chosen: Sequence[tuple[str, Payload, int]]) -> list[Excerpt]:
        """Return the trajectories at these indices of these groups, to be shown. Raises PayloadLost.

        Groups in the object store of another host are read there: their messages, up to gigabytes, stay where they are.
        """
        places = hosts_with([r for _, payload, _ in chosen if not isinstance(payload, str) for r in payload])
        here = ray.get_runtime_context().get_node_id()

        def read(group_id: str, payload: Payload, index: int) -> Excerpt:
            if isinstance(payload, str):
                return _excerpt(self.messages({group_id: payload})[group_id], index)
            for reference in _nearest_first(payload, places):
                try:
                    if here in places[reference]:
                        return _excerpt(self.messages({group_id: [reference]})[group_id], index)
                    excerpt: Excerpt = ray.get(_EXCERPT.remote(reference, index), timeout=timeouts.PAYLOAD_S)
                    return excerpt
                except PayloadLost:
                    continue
                except RayError as error:
                    _require_lost(error)
            raise PayloadLost([group_id])

        # One after the other: for tasks at one time Ray would start as many processes.
        return [read(*each) for each in chosen]

    def _read(self, payloads: Mapping[str, Payload]) -> dict[str, Any]:
        """Return the messages that there are, by group id."""
        addresses = {group_id: payload for group_id, payload in payloads.items() if isinstance(payload, str)}
        found = _in_memory({i: payload for i, payload in payloads.items() if not isinstance(payload, str)})
        if addresses:
            stored = self._redis().read(list(addresses.values()))
            found |= {group_id: stored[address] for group_id, address in addresses.items() if address in stored}
        return found

    def _redis(self) -> RedisGroups:
        if self._groups is None:
            self._groups = open_groups(self._config, "reader")
        assert self._groups is not None
        return self._groups


def _in_memory(payloads: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the messages in Ray's object stores of which a copy can be read, by group id."""
    places = hosts_with([reference for payload in payloads.values() if len(payload) > 1 for reference in payload])
    left = {
        group_id: _nearest_first(payload, places) if len(payload) > 1 else payload
        for group_id, payload in payloads.items()
    }
    found: dict[str, Any] = {}
    while left:
        found |= _readable({group_id: references[0] for group_id, references in left.items()})
        left = {i: references[1:] for i, references in left.items() if i not in found and len(references) > 1}
    return found


def hosts_with(references: Sequence[Any]) -> dict[Any, Sequence[str]]:
    """Return the hosts whose object store has each message; none for one that is lost, or so small that none has it."""
    found = ray.experimental.get_object_locations(list(references)) if references else {}
    return {reference: found.get(reference, {}).get("node_ids") or () for reference in references}


class Place(NamedTuple):
    """Where a message is, as far as Ray knows."""

    hosts: Sequence[str]
    """Those whose object store has it."""
    nbytes: int
    """0 where that is unknown."""
    on_disk: bool
    """Whether Ray has written it to a disk, for which it names no host."""


def own_place(reference: Any) -> Place:
    """Return where a message that belongs to this process is; no other process is asked."""
    found = ray.experimental.get_local_object_locations([reference]).get(reference, {})
    return Place(found.get("node_ids") or (), found.get("object_size") or 0, bool(found.get("did_spill")))


def _nearest_first(references: Sequence[Any], places: Mapping[Any, Sequence[str]]) -> list[Any]:
    """Return references to copies of one message in the order in which they are tried."""
    here = ray.get_runtime_context().get_node_id()
    return sorted(references, key=lambda reference: (here not in places[reference], not places[reference]))


def _readable(references: Mapping[str, Any]) -> dict[str, Any]:
    """Return the messages that can be read, by group id.

    A message that has an error in its place is lost. So are those that have not come when none has for
    ``timeouts.PAYLOAD_S``: a slow network brings one now and then.
    """
    if not references:
        return {}
    try:  # all at once, so that Ray fetches them side by side
        return dict(zip(references, ray.get(list(references.values()), timeout=timeouts.PAYLOAD_S), strict=True))
    except RayError as error:
        _require_lost(error)
    group_ids = {reference: group_id for group_id, reference in references.items()}
    found: dict[str, Any] = {}
    waiting = list(group_ids)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=timeouts.PAYLOAD_S)
        if not ready:
            break
        try:
            found[group_ids[ready[0]]] = ray.get(ready[0], timeout=timeouts.PAYLOAD_S)
        except RayError as error:
            _require_lost(error)
    return found


def _require_lost(error: RayError) -> None:
    """Raise an error of reading a message unless it says that the message is lost, or has not come in time."""
    if not (isinstance(error, GetTimeoutError) or is_object_lost(error)):
        raise error


def _excerpt(message: Any, index: int) -> Excerpt:
    return Excerpt.of(decode(message), index)


# Ray runs a task where its large arguments are. Made once: Ray keeps every remote function that is ever called.
_EXCERPT = ray.remote(num_cpus=0)(_excerpt)
