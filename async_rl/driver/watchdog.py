"""How long nothing has moved in a run, what waits for what, and which share of groups fails. Pure: time is passed in.

``driver.monitor`` feeds it. A run that stalls shows it within a second in ``watchdog_stalled_seconds``. After
watchdog.stall_s it is logged, and after watchdog.abort_s the run ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


class Watchdog:
    """Compares the counters of a run from one poll to the next."""

    def __init__(self) -> None:
        self._seen: Hashable = None
        self._since = 0.0

    def look(self, now: float, counted: Hashable) -> float:
        """Return the seconds for which ``counted`` has not changed."""
        if counted != self._seen:
            self._seen, self._since = counted, now
        return now - self._since


class EndShare:
    """The share of the last ``window`` groups to end that ended in one way: were given up, or filtered."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._polls: deque[tuple[int, int]] = deque()  # (ended, so) at polls, the oldest before the window

    def look(self, otherwise: int, so: int) -> float:
        """Return the share, given the groups that ended otherwise and so until now.

        Those of the first call ended before: in a run that was restored, under other settings perhaps. Before
        ``window`` groups have ended since, the rest counts as otherwise: a run does not end by its first few groups.
        """
        ended = otherwise + so
        if self._polls and ended < self._polls[-1][0]:  # a rewind
            self._polls.clear()
        self._polls.append((ended, so))
        while len(self._polls) > 1 and self._polls[1][0] <= ended - self._window:
            self._polls.popleft()
        since_ended, since_so = self._polls[0]
        return (so - since_so) / max(self._window, ended - since_ended)


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """What each process of a run does at one poll."""

    phase: str
    """Phase of the training loop: "start", "groups" while it waits for them, "update", "push" (a weight sync),
    "checkpoint", "evaluation", "restart", "export"."""
    phase_s: float
    """For how long the training loop has been in this phase, in seconds."""
    queued_groups: int
    required_groups: int
    in_flight: Mapping[str, int]
    """Groups in flight by worker."""
    refusal: str | None
    """Why the queue admits no group; None if it does."""
    unresponsive: Sequence[str] = ()
    """Processes that do not respond."""
    restarting: Sequence[str] = ()
    """Workers that are being restarted."""
    without_host: int = 0
    """Replicas that wait for a host."""
    computed: int = 0
    """How often the trainer was given groups to compute, or an update to do: with streaming several times in a step."""


def waiting_for(snapshot: RunSnapshot) -> str:
    """Return what the run waits for when nothing moves, as the label of the metric."""
    if snapshot.unresponsive:
        return "answer"
    if snapshot.phase != "groups":
        return snapshot.phase
    return "generation" if snapshot.in_flight or snapshot.refusal is None else "admission"


def describe_stall(snapshot: RunSnapshot, stalled_s: float) -> str:
    """Describe in one line what waits for what, and for how long."""
    parts = [f"nothing has moved for {stalled_s:.0f} s"]
    if snapshot.phase == "groups":
        parts.append(
            f"trainer has waited {snapshot.phase_s:.0f} s for groups ({snapshot.queued_groups} queued, "
            f"{snapshot.required_groups} needed for a step)"
        )
    else:
        parts.append(f"training loop has been in `{snapshot.phase}` for {snapshot.phase_s:.0f} s")
    in_flight = [f"{count} on {worker}" for worker, count in sorted(snapshot.in_flight.items())]
    parts.append(f"groups in flight: {', '.join(in_flight) or 'none'}")
    if snapshot.refusal is not None:
        parts.append(f"no more are admitted: {snapshot.refusal}")
    if snapshot.restarting:
        parts.append(f"restarting: {', '.join(snapshot.restarting)}")
    if snapshot.without_host:
        parts.append(f"replicas that wait for a host: {snapshot.without_host}")
    if snapshot.unresponsive:
        parts.append(f"no response from: {', '.join(snapshot.unresponsive)}")
    return "; ".join(parts)
