"""How often a process that dies is restarted, and after what delay.

``Restarts`` is pure: time is passed in. ``Recovery`` waits, logs and counts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque

import structlog

from async_rl.config.schema import RecoverySection, RunConfig
from async_rl.driver.recorder import Recorder
from async_rl.errors import ProcessLost
from async_rl.runtime.failures import unwrap_ray_error

log = structlog.get_logger(__name__)


class Restarts:
    """Counts the restarts of each process within recovery.period_s."""

    def __init__(self, settings: RecoverySection) -> None:
        self._settings = settings
        self._times: dict[str, deque[float]] = defaultdict(deque)

    def next_delay(self, process: str, now: float) -> float | None:
        """Count a restart and return the seconds to wait before it; None if the process has died too often.

        now: seconds of any monotonic clock.
        """
        times = self._times[process]
        while times and now - times[0] > self._settings.period_s:
            times.popleft()
        if len(times) >= self._settings.max_restarts:
            return None
        times.append(now)
        return self._settings.backoff_s * float(2 ** (len(times) - 1))

    def until_allowed(self, process: str, now: float) -> float:
        """Return the seconds until a restart is allowed again; infinite if none ever is."""
        times = self._times[process]
        if len(times) < self._settings.max_restarts:
            return 0.0
        return max(0.0, times[0] + self._settings.period_s - now) if times else math.inf


class Recovery:
    """Allows, delays and records the restarts of one run."""

    def __init__(self, config: RunConfig, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder
        self._restarts = Restarts(config.recovery)
        self._lost: set[str] = set()  # rollout workers that have no restart left for now

    async def wait(self, process: str, error: BaseException, **consequence: int) -> None:
        """Wait until ``process`` (trainer, rollout-0, ...), which died of ``error``, may be restarted.

        ``consequence`` are fields for the log, such as the number of groups that are issued again. Raises ProcessLost
        if the process has died too often and the run cannot do without it.
        """
        reason = " ".join(str(unwrap_ray_error(error)).split())[:200]
        while (delay := self._restarts.next_delay(process, time.monotonic())) is None:
            await self._do_without(process, reason, error)
        log.warning("process_restarting", process=process, reason=reason, delay_s=delay)
        self._recorder.restarted(process.partition("-")[0])
        self._recorder.event("process_died", process=process, **consequence)
        await asyncio.sleep(delay)

    async def _do_without(self, process: str, reason: str, error: BaseException) -> None:
        """Wait until a rollout worker that has no restart left may be tried again. Raises ProcessLost; see ``wait``."""
        settings, replicas = self._config.recovery, self._config.rollout.replicas
        others = replicas - len(self._lost | {process})
        if not process.startswith("rollout-") or others < settings.min_replicas:
            raise ProcessLost(
                f"{process} died again after {settings.max_restarts} restarts within {settings.period_s:g} s "
                f"(recovery.max_restarts): {reason} (logs: {self._config.run_dir / 'logs'})"
            ) from error
        retry_s = self._restarts.until_allowed(process, time.monotonic())
        self._lost.add(process)
        self._recorder.replicas_lost(len(self._lost))
        log.warning("replica_lost", process=process, reason=reason, others=others, retry_s=round(retry_s, 1))
        self._recorder.event("replica_lost", process=process, others=others, reason=reason)
        await asyncio.sleep(retry_s)
        self._lost.discard(process)
        self._recorder.replicas_lost(len(self._lost))
