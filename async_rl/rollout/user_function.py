"""Calls a user's function without blocking the event loop. It does not know what the function is for.

function          slow    runs
plain             false   at once, on the event loop: for functions of microseconds
plain             true    in a daemon thread, with a timeout
async def         either  on the event loop, with a timeout

Whatever function returns an awaitable has it awaited on the event loop, within what is left of the timeout.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from asyncio_throttle.throttler import Throttler

from async_rl.errors import AsyncRLError
from async_rl.types import Prompt

# Slow calls at one time per replica. Each is a thread that mostly waits; more than a few dozen gain nothing.
MAX_THREADS = 32

# Seconds for a coroutine that is cancelled to clean up; the sandbox of a code reward takes up to four to end a program.
CLEAN_UP_S = 5.0


class UserFunctionFailed(Exception):
    """There is no value: the message says what the function did, or why it was not called."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a call ended: with a value, or with what it raised.

    An exception travels as a value, because asyncio gives some a meaning: a future does not take StopIteration, a task
    that raises CancelledError counts as cancelled, and SystemExit and KeyboardInterrupt end the event loop.
    """

    value: Any = None
    raised: BaseException | None = None

    def result(self) -> Any:
        """Return the value. Raises UserFunctionFailed with what the function raised as its cause."""
        if self.raised is None:
            return self.value
        if isinstance(self.raised, AsyncRLError):  # Written for the user.
            raise UserFunctionFailed(str(self.raised)) from self.raised
        message = f": {self.raised}" if str(self.raised) else ""
        raise UserFunctionFailed(f"raised {type(self.raised).__name__}{message}") from self.raised


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
        self._needs_thread = slow and not _is_async(function)
        self._timeout_s = timeout_s
        self._throttler = throttler
        self._slots = asyncio.Semaphore(MAX_THREADS)
        self._abandoned = 0
        self._left_behind: set[asyncio.Task[_Outcome]] = set()  # The event loop itself keeps weak references only.
        self._closed = False

    def close(self) -> None:
        """Refuse further calls, without waiting: threads that still run are daemons and end with the process."""
        self._closed = True

    async def __call__(self, prompt: Prompt, argument: Any) -> Any:
        """Return what the function returned.

        Raises UserFunctionFailed when it raised anything, took too long or was not called, and CancelledError only when
        the caller is cancelled.
        """
        if self._closed:
            raise UserFunctionFailed("not called, because the worker is shutting down")
        if self._throttler is not None:
            async with self._throttler:  # Waits here; leaving does nothing: what is limited is how often calls begin.
                pass
        if self._needs_thread:
            async with self._slots:
                began = time.monotonic()
                value = (await self._in_thread(prompt, argument)).result()
        else:
            began = time.monotonic()
            value = _call(self._function, prompt, argument).result()
        if not inspect.isawaitable(value):
            return value
        return (await self._awaited(value, self._timeout_s - (time.monotonic() - began))).result()

    async def _awaited(self, awaitable: Awaitable[Any], seconds: float) -> _Outcome:
        """Await in a task of its own: a CancelledError that the function raises is then no cancellation of the caller.

        What is still not over some time after it was cancelled is left behind.
        """
        task = asyncio.create_task(_await(awaitable))
        try:
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                return task.result()
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._left_behind.discard)
                await asyncio.wait({task}, timeout=CLEAN_UP_S)
        raise self._too_late()

    async def _in_thread(self, prompt: Prompt, argument: Any) -> _Outcome:
        """Call the function in a daemon thread. A call that hangs is abandoned, and counted.

        A thread cannot be stopped, and the workers of a thread pool would hold up the exit of the process.
        """
        if self._abandoned >= MAX_THREADS:
            raise UserFunctionFailed(
                f"{self._abandoned} earlier calls are past {self._setting}.timeout_s and still run; it seems to hang"
            )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_Outcome] = loop.create_future()

        def deliver(outcome: _Outcome) -> None:
            if done.done():  # The caller gave up waiting.
                self._abandoned -= 1
            else:
                done.set_result(outcome)

        def run() -> None:
            outcome = _call(self._function, prompt, argument)
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, outcome)

        threading.Thread(target=run, name=f"{self._setting} {prompt.prompt_id}", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await done
        except TimeoutError:
            self._abandoned += 1
            raise self._too_late() from None
        except asyncio.CancelledError:
            self._abandoned += 1
            raise

    def _too_late(self) -> UserFunctionFailed:
        return UserFunctionFailed(f"did not return within {self._setting}.timeout_s = {self._timeout_s:g} s")


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling the function only makes a coroutine, for which no thread is needed."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _call(function: Callable[..., Any], *arguments: Any) -> _Outcome:
    try:
        return _Outcome(function(*arguments))
    except BaseException as error:  # noqa: BLE001 - whatever the user's function raises goes to the caller
        return _Outcome(raised=error)


async def _await(awaitable: Awaitable[Any]) -> _Outcome:
    try:
        return _Outcome(await awaitable)
    except BaseException as error:  # noqa: BLE001 - as above
        return _Outcome(raised=error)
