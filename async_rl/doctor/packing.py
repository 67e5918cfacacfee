"""Distributes processes over hosts that have so many GPUs, or CPUs: whether a run fits, and where. Pure.

Each process needs its units on one host. First fit, the largest processes first, is exact for a run on GPUs: engines of
one size leave the same number of GPUs free however they are distributed, and a trainer rank takes any one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """Processes of one kind, alike in what they need."""

    what: str
    """One of them, for example ``engine``."""
    count: int
    size: int
    """Units that each needs, on one host."""
    settings: str
    """The settings that ``count`` and ``size`` come from."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where processes fit."""

    placed: Mapping[str, Mapping[str, int]]
    """Processes by host and kind."""
    left: Mapping[str, int]
    """By kind, those that fit nowhere; empty if all fit."""


def pack(room: Mapping[str, int], needs: Sequence[Need]) -> Packing:
    """Distribute the processes of ``needs`` over hosts with so many units of ``room``, hosts in their order."""
    free = dict(room)
    placed: dict[str, dict[str, int]] = {host: {} for host in room}
    left = {}
    for need in sorted(needs, key=lambda need: -need.size):
        missing = need.count
        for host in free:
            fits = min(missing, free[host] // need.size)
            if fits:
                free[host] -= fits * need.size
                placed[host][need.what] = placed[host].get(need.what, 0) + fits
                missing -= fits
        if missing:
            left[need.what] = missing
    return Packing(placed, left)


def misfit(room: Mapping[str, int], needs: Sequence[Need], unit: str) -> str | None:
    """Say in one line why the processes do not fit, for example that no host has 8 GPUs for an engine; None if they do.

    unit: what is counted, for example ``GPUs``.
    """
    packing = pack(room, needs)
    if not packing.left:
        return None
    there = listed([f"{host}: {units}" for host, units in room.items()])
    for need in needs:
        if need.count and need.size > max(room.values(), default=0):
            return f"no host has {need.size} {unit} for {_one(need.what)} ({there})"
    total, needed = sum(room.values()), sum(need.count * need.size for need in needs)
    wanted = " and ".join(
        counted(need.count, need.what) + (f" of {need.size}" if need.size > 1 else "") for need in needs if need.count
    )
    if total < needed:
        return f"{total} {unit} in all ({there}), but {needed} are needed for {wanted}"
    kind = next(need for need in needs if need.what in packing.left)
    return (
        f"{total} {unit} are enough in all ({there}), but {packing.left[kind.what]} of {wanted} find no host with "
        f"{kind.size} free: each needs its {unit} on one host"
    )


def listed(items: Sequence[str], most: int = 8) -> str:
    """Join items by commas, of many only the first ones and how many more there are."""
    more = len(items) - most
    return ", ".join(items) if more <= 0 else f"{', '.join(items[:most])} and {more} more"


def counted(count: int, what: str) -> str:
    """Return a number of things in words, for example ``1 engine`` or ``2 engines``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _one(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
