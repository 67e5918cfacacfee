"""What the queue says and is told: tickets, what it knows of a group, counts, one moment's state. Plain
frozen data.

Knows ``types``, and the counts that ``metrics`` shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_rl.metrics.records import GroupCounts
from async_rl.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to generate one group. version: the policy version when it was issued."""

    group_id: str
    prompt: Prompt
    version: int


@dataclass(frozen=True, slots=True)
class GroupMeta:
    """What the queue knows of a group without opening it."""

    group_id: str
    num_tokens: int
    nbytes: int
    oldest_version: int
    newest_version: int
    num_trajectories: int
    num_partial: int
    lengths: tuple[int, ...] = ()
    """Tokens of each trajectory."""
    address: str = ""
    """Where the encoded group is, for a backend that has addresses of its own; "" in the object store."""

    @classmethod
    def from_fields(cls, fields: Sequence[Any]) -> GroupMeta:
        """From the values of its fields in order, as ``dataclasses.astuple`` gives them."""
        named = dict(zip((field.name for field in dataclasses.fields(cls)), fields, strict=True))
        return cls(**named | {"lengths": tuple(named["lengths"])})

    @classmethod
    def of(cls, group: Group, nbytes: int) -> GroupMeta:
        """nbytes: size of the encoded group."""
        return cls(
            group_id=group.group_id,
            num_tokens=group.num_tokens,
            nbytes=nbytes,
            oldest_version=group.oldest_version,
            newest_version=max(int(t.versions.max()) for t in group.trajectories),
            num_trajectories=len(group.trajectories),
            num_partial=sum(t.is_partial for t in group.trajectories),
            lengths=tuple(t.num_tokens for t in group.trajectories),
        )


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One moment of the queue, for metrics and for the watchdog's line.

    window_groups: how much of window_limit is taken. held: queued and leased, which max_groups and max_bytes bound.
    running: groups per worker. oldest_version: of what is running (when issued) or queued (its oldest token),
    None when there is nothing. returned, dropped, failed: groups per reason. refusal: why no ticket can be
    issued now, None if one can. exhausted: the dataset had no prompt left when last asked. take_wait_s: seconds
    that workers have waited for tickets so far, summed over workers. pid: of the queue's process.
    """

    version: int
    window_limit: int
    window_groups: int
    counts: GroupCounts
    queued_groups: int
    queued_bytes: int
    leased_groups: int
    held_bytes: int
    max_groups: int
    max_bytes: int
    running: Mapping[str, int]
    oldest_version: int | None
    returned: Mapping[str, int]
    dropped: Mapping[str, int]
    failed: Mapping[str, int]
    refusal: str | None
    exhausted: bool
    take_wait_s: float = 0.0
    pid: int = 0
