"""The part of a host's cores that a process of the run computes on. Pure; ``process`` applies it.

On a CPU host each engine and each trainer rank gets cores of its own: two compute-thread pools that share cores spin
against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
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
