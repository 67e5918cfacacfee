"""Progress: for how long nothing has moved, and who waits for whom. Pure: time is passed in.

A run that stands still shows it within a second in ``watchdog_stalled_seconds``; after watchdog.stall_s the log says
why, and after watchdog.abort_s the run ends (``pipeline``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Situation:
    """What everybody is at.

    trainer: what the training loop is at ("groups" while it waits for them, "update", "push", "checkpoint",
    "evaluation", "restart"), and trainer_s since when, in seconds. running: groups in flight by worker. refusal: why no
    ticket can be issued, None where one can. silent: processes that do not answer. absent: workers that are being
    started again.
    """

    trainer: str
    trainer_s: float
    queued_groups: int
    required_groups: int
    running: Mapping[str, int]
    refusal: str | None
    silent: Sequence[str] = ()
    absent: Sequence[str] = ()


def waiting_for(situation: Situation) -> str:
    """What the run waits for when nothing moves, in one word: the label of the metric."""
    if situation.silent:
        return "answer"
    if situation.trainer != "groups":
        return situation.trainer
    return "generation" if situation.running or situation.refusal is None else "admission"


def account(situation: Situation, stalled_s: float) -> str:
    """One line that says who waits for whom and since when."""
    parts = [f"nothing has moved for {stalled_s:.0f} s"]
    if situation.trainer == "groups":
        parts.append(
            f"the trainer has waited {situation.trainer_s:.0f} s for groups: {situation.queued_groups} are queued, a "
            f"step takes {situation.required_groups}"
        )
    else:
        parts.append(f"the training loop is in its {situation.trainer} since {situation.trainer_s:.0f} s")
    running = [f"{count} on {worker}" for worker, count in sorted(situation.running.items())]
    parts.append(f"groups in flight: {', '.join(running) or 'none'}")
    if situation.refusal is not None:
        parts.append(f"no more are issued: {situation.refusal}")
    if situation.absent:
        parts.append(f"being started again: {', '.join(situation.absent)}")
    if situation.silent:
        parts.append(f"no answer from: {', '.join(situation.silent)}")
    return "; ".join(parts)
