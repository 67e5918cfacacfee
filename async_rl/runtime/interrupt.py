"""Ends the coroutines of a run: on a signal, or when the first of them fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from async_rl.runtime.process import CHECKPOINT


class Interrupted(Exception):
    """The run was ended by Ctrl-C or SIGTERM."""


def _at_once() -> float:
    return 0.0


async def until_interrupted(
    work: Any, *, wind_up: Callable[[], float] = _at_once, on_demand: Callable[[], None] | None = None
) -> None:
    """Await ``work``; on Ctrl-C or SIGTERM end it, let it clean up, and raise Interrupted.

    ``work`` is cancelled, at SIGTERM after the seconds that ``wind_up`` returns, in which it may end by itself.
    ``on_demand`` is called on SIGUSR2.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    def terminate() -> None:
        nonlocal interrupted
        if interrupted:
            return  # the supervisor passes on what a job scheduler has sent to every process
        interrupted = True
        # Not call_later for 0 s: the task must not begin anything more.
        if (grace_s := wind_up()) > 0:
            loop.call_later(grace_s, task.cancel)
        else:
            task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, terminate)
    if on_demand is not None:
        loop.add_signal_handler(CHECKPOINT, on_demand)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    if interrupted:
        raise Interrupted


async def first_failure(main: Any, *others: Any) -> None:
    """Await ``main``, or raise what any of ``others`` raises before that. All are cancelled on return."""
    leader = asyncio.ensure_future(main)
    tasks = {leader, *(asyncio.ensure_future(other) for other in others)}
    try:
        while not leader.done():
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
