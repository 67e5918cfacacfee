"""When a checkpoint is due. Pure: time is passed in."""

from __future__ import annotations

from async_rl.config.operation import CheckpointSection


class CheckpointSchedule:
    """Decides at the end of each training step: every so many steps, every so many seconds, or because asked for."""

    def __init__(self, settings: CheckpointSection, now: float) -> None:
        """``now``: seconds of any monotonic clock, from which checkpoint.every_s is counted."""
        self._settings = settings
        self._last = now
        self._requested = False

    def request(self) -> None:
        """Ask for a checkpoint at the end of the current step."""
        self._requested = True

    def due(self, step: int, now: float) -> bool:
        """Return whether a checkpoint of ``step`` is to be written; the next is then counted from ``now``."""
        every, every_s = self._settings.every, self._settings.every_s
        due = self._requested or bool(every and step % every == 0) or bool(every_s and now - self._last >= every_s)
        if due:
            self._last, self._requested = now, False
        return due
