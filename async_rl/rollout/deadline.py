"""The time limit of a group, for which only the time counts in which its engine may compute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any, TypeVar

from async_rl.rollout.gate import Gate

_Task = TypeVar("_Task", bound=asyncio.Task[Any])


async def wait_in_time(tasks: Collection[_Task], gate: Gate, limit: float | None) -> tuple[set[_Task], set[_Task]]:
    """Wait for tasks until all are done, one has failed or ``limit`` seconds are over; None for no limit.

    Returns those that are done and the others. Pauses of the engine behind ``gate`` do not count.
    """
    began, paused_before, left = time.monotonic(), gate.paused_s, limit
    while True:
        done, late = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        if limit is None or not late or any(task.cancelled() or task.exception() for task in done):
            return done, late
        await gate.wait_open()
        left = limit + (gate.paused_s - paused_before) - (time.monotonic() - began)
        if left <= 0:
            return done, late
