"""How often a process that dies is started again, and after what wait. Pure: time is passed in."""

from __future__ import annotations

from collections import defaultdict, deque

from async_rl.config import RecoverySection


class Restarts:
    """Counts restarts by kind of process, within recovery.period_s."""

    def __init__(self, settings: RecoverySection) -> None:
        self._settings = settings
        self._times: dict[str, deque[float]] = defaultdict(deque)

    def again(self, kind: str, now: float) -> float | None:
        """Seconds to wait before a process of this kind is started again; None if it has died too often.

        now: seconds of any clock that only rises.
        """
        times = self._times[kind]
        while times and now - times[0] > self._settings.period_s:
            times.popleft()
        if len(times) >= self._settings.max_restarts:
            return None
        times.append(now)
        return self._settings.backoff_s * float(2 ** (len(times) - 1))
