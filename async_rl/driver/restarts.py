"""How often a process that dies is started again, and after what wait.

``Restarts`` is pure: time is passed in. ``Recovery`` waits, and tells everybody.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque

import structlog

from async_rl.config.schema import RecoverySection, RunConfig
from async_rl.driver.recorder import Recorder
from async_rl.errors import ProcessLost
from async_rl.runtime.failures import unwrap_ray_error

log = structlog.get_logger(__name__)


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


class Recovery:
    """The restarts of one run."""

    def __init__(self, config: RunConfig, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder
        self._restarts = Restarts(config.recovery)

    async def wait(self, kind: str, error: BaseException, consequence: str) -> None:
        """Before a process of this ``kind``, which died of ``error``, is started again; ``consequence`` is for the log.

        Raises ProcessLost where it has died too often.
        """
        reason = " ".join(str(unwrap_ray_error(error)).split())[:200]
        delay = self._restarts.again(kind, time.monotonic())
        if delay is None:
            settings = self._config.recovery
            raise ProcessLost(
                f"{kind} died once more, after {settings.max_restarts} restarts within {settings.period_s:g} s "
                f"(recovery.max_restarts): {reason} (logs: {self._config.run_dir / 'logs'})"
            ) from error
        log.warning("a process died", process=kind, reason=reason, restart_in_s=delay)
        self._recorder.restarted(kind.partition("-")[0])
        self._recorder.event(f"{kind} died and is started again; {consequence}")
        await asyncio.sleep(delay)
