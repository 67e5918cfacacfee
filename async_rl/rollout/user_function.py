"""Calls a user's function without blocking the event loop. It does not know what the function is for.

function          slow    runs
plain             false   at once, on the event loop: for functions of microseconds
plain             true    in a daemon thread, rate-limited, with a timeout
async def         either  on the event loop, rate-limited, with a timeout
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from asyncio_throttle.throttler import Throttler

from async_rl.types import Prompt

# Slow calls at one time per replica. Each is a thread that mostly waits; more than a few dozen gain nothing.
MAX_THREADS = 32


class UserFunctionUnavailable(Exception):
    """The call was not made; the message says why."""


class UserFunction:
    """``function(prompt, argument)``; ``setting`` is the config section that messages name, "reward" for example."""

    def __init__(
        self,
        function: Callable[..., Any],
        setting: str,
        *,
        slow: bool,
        timeout_s: float,
        throttler: Throttler | None = None,
    ) -> None:
        self._function = function
        self._setting = setting
        self._is_async = inspect.iscoroutinefunction(function)
        self._slow = slow
        self._timeout_s = timeout_s
        self._throttler = throttler
        self._slots = asyncio.Semaphore(MAX_THREADS)
        self._abandoned = 0
        self._closed = False

    def close(self) -> None:
        """Refuse further calls, without waiting: threads that still run are daemons and end with the process."""
        self._closed = True

    async def __call__(self, prompt: Prompt, argument: Any) -> Any:
        """Return what the function returned. Raises what it raised, TimeoutError, or UserFunctionUnavailable."""
        if self._closed:
            raise UserFunctionUnavailable("not called, because the worker is shutting down")
        if not (self._slow or self._is_async):
            return self._function(prompt, argument)
        if self._throttler is not None:
            async with self._throttler:  # Waits here; leaving does nothing: what is limited is how often calls begin.
                pass
        if self._is_async:
            async with asyncio.timeout(self._timeout_s):
                return await _awaitable(self._function(prompt, argument))
        async with self._slots:
            return await self._in_thread(prompt, argument)

    async def _in_thread(self, prompt: Prompt, argument: Any) -> Any:
        """Call the function in a daemon thread. A call that hangs is abandoned, and counted.

        A thread cannot be stopped, and the workers of a thread pool would hold up the exit of the process.
        """
        if self._abandoned >= MAX_THREADS:
            raise UserFunctionUnavailable(
                f"{self._abandoned} earlier calls are past {self._setting}.timeout_s and still run; it seems to hang"
            )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def deliver(value: Any, error: Exception | None) -> None:
            if done.done():  # The caller gave up waiting.
                self._abandoned -= 1
            elif error is not None:
                done.set_exception(error)
            else:
                done.set_result(value)

        def run() -> None:
            value, failure = None, None
            try:
                value = self._function(prompt, argument)
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises goes to the caller
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, value, failure)

        threading.Thread(target=run, name=f"{self._setting} {prompt.prompt_id}", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await done
        except (TimeoutError, asyncio.CancelledError):
            self._abandoned += 1
            raise


async def _awaitable(value: Awaitable[Any] | Any) -> Any:
    return await value
