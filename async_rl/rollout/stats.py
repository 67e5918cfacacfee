"""What a rollout worker reports of itself: its id, its counters, and the stopwatch behind the times among them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from async_rl.types import Group


def worker_id(replica: int) -> str:
    """Return the worker's id as used by the broker and in messages, for example ``rollout-0``."""
    return f"rollout-{replica}"


@dataclass(slots=True)
class WorkerStats:
    """Counters since the start of the worker. Times are in seconds."""

    replica: int
    gone: bool = False
    """Whether the replica has no worker now: the counters are those of earlier ones."""
    version: int = 0
    """Policy version of the engine's weights."""
    generated_tokens: int = 0
    """Tokens of ended calls for rollouts."""
    sampled_tokens: int = 0
    """Tokens of all calls, those under way and those of evaluations included."""
    resumed_prefill_tokens: int = 0
    """Tokens that calls had to compute again because an interruption had ended the call before them."""
    partial_rollouts: int = 0
    """Published trajectories of more than one segment."""
    trajectories: int = 0
    """Published trajectories."""
    groups: int = 0
    """Published groups."""
    cut_groups: int = 0
    """Groups published without their slowest responses, after rollout.group_timeout_s."""
    running_trajectories: int = 0
    """Engine calls under way now."""
    busy_s: float = 0.0
    """Time with an engine call under way, pauses excluded."""
    paused_s: float = 0.0
    """Time paused for weight syncs and checkpoints."""

    def publish(self, group: Group) -> None:
        """Count a group that was published."""
        self.groups += 1
        self.trajectories += len(group.trajectories)
        self.partial_rollouts += sum(trajectory.is_partial for trajectory in group.trajectories)


class Stopwatch:
    """Measures the seconds for which a condition held. It reads the clock only when the condition changes."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def set(self, *, running: bool) -> float:
        """Note whether the condition holds from now on. Returns the seconds for which it held just before."""
        now = time.monotonic()
        elapsed = 0.0 if self._since is None else now - self._since
        self._total += elapsed
        self._since = now if running else None
        return elapsed

    @property
    def seconds(self) -> float:
        return self._total + (time.monotonic() - self._since if self._since is not None else 0.0)
