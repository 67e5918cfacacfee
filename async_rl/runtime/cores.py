"""The part of a host's cores that a process of the run computes on. Pure; ``process`` applies it.

On a CPU host each engine and each trainer rank gets cores of its own: two compute-thread pools that share cores spin
against each other.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoreShare:
    """The part of a host's cores that one of the run's processes computes on, whatever their numbers there are."""

    first: int
    """How many of the cores that the process may use come before its own."""
    count: int
    """How many are its own."""
    needed: int
    """How many the run's processes on this host need together."""

    def of(self, usable: Sequence[int]) -> tuple[int, ...] | None:
        """Return the process's part of the ``usable`` cores; None if they are too few for the run's processes."""
        return None if self.needed > len(usable) else tuple(usable[self.first : self.first + self.count])


class HostCores:
    """The cores that a run's processes have on each host. A process that stays keeps its own, whatever else comes."""

    def __init__(self) -> None:
        self._host: dict[str, str] = {}  # by process
        self._given: dict[str, dict[str, range]] = {}  # by host and process

    def give(self, process: str, host: str, count: int) -> None:
        """Give a process cores of a host, in place of those that it has elsewhere."""
        if self._host.get(process) == host:
            return
        self._free(process)
        there = self._given.setdefault(host, {})
        first = 0
        for taken in sorted(there.values(), key=lambda taken: taken.start):
            if taken.start - first >= count:
                break
            first = taken.stop
        self._host[process] = host
        there[process] = range(first, first + count)

    def keep(self, processes: Container[str]) -> None:
        """Free the cores of all other processes."""
        for process in [process for process in self._host if process not in processes]:
            self._free(process)

    def share(self, process: str) -> CoreShare:
        """Return the cores of a process, and how many all that are on its host by now need."""
        there = self._given[self._host[process]]
        own = there[process]
        return CoreShare(own.start, len(own), max(taken.stop for taken in there.values()))

    def _free(self, process: str) -> None:
        host = self._host.pop(process, None)
        if host is not None:
            del self._given[host][process]
