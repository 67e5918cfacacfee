"""Waits until the processes of a run have started, and names those that have not. Knows neither Ray nor the actors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from async_rl.config.operation import WatchdogSection
from async_rl.errors import StalledError

log = structlog.get_logger(__name__)


async def wait_started(
    starting: Mapping[str, Awaitable[None]],
    settings: WatchdogSection,
    event: Callable[..., None],
    free_resources: Callable[[], Awaitable[str]],
) -> None:
    """Wait for the starts of processes, by name; raises what the first of them raised.

    ``event`` shows an event of the run, ``free_resources`` returns what the cluster has left.

    Every watchdog.stall_s, those that are missing are named with the resources that the cluster has left: an actor that
    asks for more is never placed, and starts without an error or an end. Raises StalledError after watchdog.abort_s.
    """
    began = time.monotonic()
    tasks = {name: asyncio.ensure_future(start) for name, start in starting.items()}
    together = asyncio.gather(*tasks.values())
    try:
        while True:
            await asyncio.wait({together}, timeout=settings.stall_s)
            if together.done():
                together.result()
                return
            waited = round(time.monotonic() - began)
            missing = ", ".join(name for name, task in tasks.items() if not task.done())
            fields = {"missing": missing, "waited_s": waited, "free": await free_resources()}
            log.warning("start_takes_long", **fields)
            event("start_takes_long", **fields)
            if time.monotonic() - began >= settings.abort_s:
                raise StalledError(
                    f"{missing} did not start within watchdog.abort_s = {settings.abort_s:g} s. The cluster has "
                    f"{fields['free']} left: a process that asks for more is not placed (rollout.replicas, "
                    "rollout.tensor_parallel_size, trainer.parallel); else see the logs of the run"
                )
    finally:
        together.cancel()
