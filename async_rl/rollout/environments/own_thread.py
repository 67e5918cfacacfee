"""Calls of a user's methods, plain or async, that never block the event loop. Imports the standard library alone.

The plain methods of one environment run one after another in a thread of their own, so that what belongs to a thread (a
database, a browser) works. A thread cannot be stopped: one that hangs is given up, and the next call has another.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

_Job = tuple[Callable[[], Any], "asyncio.Future[tuple[bool, Any]]"]


class OwnThread:
    """Where the plain methods of one environment run; the thread begins with the first call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] | None = None

    async def call(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        """Return what a function returns, awaited if it can be. Raises what it raises.

        When this is cancelled, an async function is too; a plain one goes on, and what it returns is lost.
        """
        if inspect.iscoroutinefunction(function):
            return await function(*arguments, **named)
        result = await self._in_thread(lambda: function(*arguments, **named))
        return await result if inspect.isawaitable(result) else result

    def end(self) -> None:
        """End the thread, once the call in it has ended."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            # A daemon: one that hangs must not keep the process from its end.
            threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True).start()
        ended: asyncio.Future[tuple[bool, Any]] = asyncio.get_running_loop().create_future()
        self._jobs.put((work, ended))
        try:
            returned, value = await ended
        except asyncio.CancelledError:
            self.end()
            raise
        if not returned:
            raise value
        return value


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        work, ended = job
        try:
            outcome = (True, work())
        except BaseException as error:  # noqa: BLE001 - whatever the user's method raises goes to the caller
            outcome = (False, error)
        del work
        try:
            ended.get_loop().call_soon_threadsafe(_set, ended, outcome)
        except RuntimeError:
            return  # The loop is closed.


def _set(ended: asyncio.Future[tuple[bool, Any]], outcome: tuple[bool, Any]) -> None:
    if not ended.done():
        ended.set_result(outcome)
