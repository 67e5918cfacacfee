"""Notices that an engine is dead or hangs. Knows the engine's interface and the gate before it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineDied
from async_rl.rollout.engine.interface import RolloutEngine
from async_rl.rollout.gate import Gate

_PERIOD_S = 1.0


async def watch_engine(config: RunConfig, name: str, engine: RolloutEngine, gate: Gate) -> NoReturn:
    """Raise EngineDied soon after the engine of worker ``name`` died, or when it is silent for watchdog.stall_s.

    During a weight sync there may be no call that would notice a death. The time of a sync itself does not count:
    sync.timeout_s limits that.
    """
    limit_s = config.watchdog.stall_s
    ping = asyncio.ensure_future(engine.ping())
    waited = 0.0
    try:
        while True:
            await asyncio.sleep(_PERIOD_S)
            engine.check_alive()
            if ping.done():
                ping.result()
                ping = asyncio.ensure_future(engine.ping())
                waited = 0.0
            elif gate.is_open:
                waited += _PERIOD_S
            if waited > limit_s:
                raise EngineDied(f"{name}: the engine has not answered for {limit_s:g} s (watchdog.stall_s)")
    finally:
        ping.cancel()
