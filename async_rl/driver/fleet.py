"""What each replica of a run does, and when there are too few of them. Pure: time is passed in.

state       what it means                                                     next
waiting     for a host, which Ray is asked for as long as the run lasts       starting
starting    has a place; its engine starts, or it waits for weights           working, waiting, lost
working     has the current weights, or takes part in a weight sync           starting, waiting
lost        its restarts are spent (``driver.restarts``), it is tried later   starting
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from async_rl.config.rollouts import ReplicaRange

State = Literal["waiting", "starting", "working", "lost"]
STATES: tuple[State, ...] = ("waiting", "starting", "working", "lost")


class Fleet:
    """The replicas of one run, by worker id."""

    def __init__(self, replicas: ReplicaRange, needed: int, patience_s: float) -> None:
        """Begin with all replicas waiting.

        ``needed``: replicas without which the run fails. ``patience_s``: for how long fewer may have a host.
        """
        self.replicas = replicas
        self.needed = needed
        self._patience_s = patience_s
        self._states: dict[str, State] = {}  # of those that have moved
        self._count = dict.fromkeys(STATES, 0)
        self._count["waiting"] = replicas.max
        self._watched = False
        self._short_since: float | None = None

    def move(self, worker: str, state: State, now: float) -> None:
        """Note what a replica does from ``now`` on, in seconds of any monotonic clock."""
        self._count[self._states.get(worker, "waiting")] -= 1
        self._count[state] += 1
        self._states[worker] = state
        self._look(now)

    def begin(self, now: float) -> None:
        """Note that training begins: from now on the run must have the replicas that it needs."""
        self._watched = True
        self._look(now)

    def _look(self, now: float) -> None:
        if self.present >= self.needed:
            self._short_since = None
        elif self._watched and self._short_since is None:
            self._short_since = now

    @property
    def present(self) -> int:
        """Replicas that have a place, and restarts left."""
        return self._count["starting"] + self._count["working"]

    @property
    def counts(self) -> Mapping[State, int]:
        """The number of replicas in each state."""
        return dict(self._count)

    def others(self, worker: str) -> int:
        """Return how many replicas other than this one have a place, and restarts left."""
        return self.present - (self._states.get(worker) in ("starting", "working"))

    def patience_left_s(self, now: float) -> float | None:
        """Return for how many seconds the run may still have too few replicas; None if it has enough."""
        return None if self._short_since is None else self._short_since + self._patience_s - now
