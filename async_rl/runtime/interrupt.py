"""Ends the coroutines of a run: on a signal, or when the first of them fails."""

from __future__ import annotations

import asyncio
import signal
from typing import Any


class Interrupted(Exception):
    """The run was ended by Ctrl-C or SIGTERM."""


async def until_interrupted(work: Any) -> None:
    """Await ``work``; on Ctrl-C or SIGTERM cancel it, let it clean up, and raise Interrupted."""
    task = asyncio.ensure_future(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if interrupted:
            raise Interrupted from None
        raise


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
