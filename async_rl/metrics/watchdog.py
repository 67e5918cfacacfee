"""Progress: for how long nothing has moved, and what is waited for. Pure: time is passed in.

A run that stands still shows it within a second in ``watchdog_stalled_seconds``; whoever reads it decides what to do.
"""

from __future__ import annotations

from collections.abc import Hashable


class Watchdog:
    """Compares what has been counted from one look to the next."""

    def __init__(self) -> None:
        self._seen: Hashable = None
        self._since = 0.0

    def look(self, now: float, counted: Hashable) -> float:
        """Seconds for which ``counted`` has not changed."""
        if counted != self._seen:
            self._seen, self._since = counted, now
        return now - self._since


def waiting_for(*, leased_groups: int, refusal: str | None) -> str:
    """What the run waits for when nothing moves: the trainer's update, admission (hence a push), or generation."""
    if leased_groups:
        return "update"
    return "generation" if refusal is None else "admission"
