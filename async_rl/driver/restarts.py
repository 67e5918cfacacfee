"""How often a process that dies is restarted, after what delay, and when a run has too few replicas to continue.

``Restarts`` is pure: time is passed in. ``Recovery`` waits, logs and counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict, deque

import structlog

from async_rl.config.operation import RecoverySection
from async_rl.config.schema import RunConfig
from async_rl.driver.fleet import Fleet, State
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
    """Allows, delays and records the restarts of one run, and knows what each of its replicas does."""

    def __init__(self, config: RunConfig, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder
        self._restarts = Restarts(config.recovery)
        self.fleet = Fleet(config.rollout.replica_range, config.needed_replicas, config.watchdog.abort_s)
        self._moved = asyncio.Event()

    def moved(self, worker: str, state: State) -> None:
        """Note what a replica does from now on, and publish how many do what."""
        self.fleet.move(worker, state, time.monotonic())
        self._recorder.replicas(self.fleet.counts)
        self._moved.set()

    async def watch(self) -> None:
        """Wait until the run has had too few replicas with a host for watchdog.abort_s, and raise ProcessLost then."""
        self.fleet.begin(time.monotonic())
        short = False
        while (left_s := self.fleet.patience_left_s(time.monotonic())) is None or left_s > 0:
            if left_s is not None and not short:
                fields = {"present": self.fleet.present, "needed": self.fleet.needed, "patience_s": round(left_s)}
                log.warning("replicas_short", **fields)
                self._recorder.event("replicas_short", **fields)
            short = left_s is not None
            self._moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left_s)
        raise ProcessLost(
            f"the run needs {self.fleet.needed} replicas (recovery.min_replicas), but for watchdog.abort_s = "
            f"{self._config.watchdog.abort_s:g} s it had a host for {self.fleet.present}; `ray status` shows which "
            "hosts are missing, --resume auto continues the run"
        )

    async def wait(self, process: str, error: BaseException, **consequence: int) -> None:
        """Wait until ``process`` (trainer, rollout-0, ...), which died of ``error``, may be restarted.

        ``consequence`` are fields for the log, such as the number of groups that are issued again. Raises ProcessLost
        if the process has died too often and the run cannot do without it.
        """
        reason = " ".join(str(unwrap_ray_error(error)).split())[:200]
        if process.startswith("rollout-"):
            self.moved(process, "starting")
        while (delay := self._restarts.next_delay(process, time.monotonic())) is None:
            await self._do_without(process, reason, error)
        log.warning("process_restarting", process=process, reason=reason, delay_s=delay)
        self._recorder.restarted(process.partition("-")[0])
        self._recorder.event("process_died", process=process, **consequence)
        await asyncio.sleep(delay)

    async def _do_without(self, process: str, reason: str, error: BaseException) -> None:
        """Wait until a rollout worker that has no restart left may be tried again. Raises ProcessLost; see ``wait``."""
        settings = self._config.recovery
        others = self.fleet.others(process) if process.startswith("rollout-") else 0
        if others < self.fleet.needed:
            raise ProcessLost(
                f"{process} died again after {settings.max_restarts} restarts within {settings.period_s:g} s "
                f"(recovery.max_restarts): {reason} (logs: {self._config.run_dir / 'logs'})"
            ) from error
        retry_s = self._restarts.until_allowed(process, time.monotonic())
        self.moved(process, "lost")
        log.warning("replica_lost", process=process, reason=reason, others=others, retry_s=round(retry_s, 1))
        self._recorder.event("replica_lost", process=process, others=others, reason=reason)
        await asyncio.sleep(retry_s)
        self.moved(process, "starting")
