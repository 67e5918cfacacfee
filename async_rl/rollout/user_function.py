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
import math
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncio_throttle.throttler import Throttler

from async_rl.errors import AsyncRLError
from async_rl.types import Prompt

# Seconds for a coroutine that is cancelled to clean up; the sandbox of a code reward takes up to four to end a program.
CLEAN_UP_S = 5.0

_LIMITS_OWN_TIME = "limits_own_time"
_AsyncFunction = TypeVar("_AsyncFunction", bound=Callable[..., Awaitable[Any]])


def limits_own_time(function: _AsyncFunction) -> _AsyncFunction:
    """Mark an async function each of whose calls ends by itself, so that no time limit of the settings holds for it.

    It is meant for a function that waits for a place before it works: under load, the wait would end the call.
    """
    setattr(function, _LIMITS_OWN_TIME, True)
    return function


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
    """``function(prompt, argument)``; ``setting`` is the config section that messages name, "reward" for example.

    workers: calls that may be in threads at one time, those not counted that are past their time limit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        setting: str,
        *,
        slow: bool,
        timeout_s: float,
        workers: int,
        throttler: Throttler | None = None,
    ) -> None:
        self._function = function
        self._setting = setting
        self._threads = _Threads(setting, workers, timeout_s) if slow and not _is_async(function) else None
        self._timeout_s = math.inf if hasattr(function, _LIMITS_OWN_TIME) else timeout_s
        self._throttler = throttler
        self._next_at_throttler = asyncio.Lock()
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
            # Each that waits at the throttler polls it a hundred times a second, so one at a time does. Leaving it does
            # nothing: what is limited is how often calls begin.
            async with self._next_at_throttler, self._throttler:
                pass
        if self._threads is None:
            began = time.monotonic()
            outcome: _Outcome | None = _call(self._function, prompt, argument)
        else:
            await self._threads.place()
            began = time.monotonic()
            outcome = await self._threads.call(self._function, prompt, argument)
        value = self._value(outcome)
        if not inspect.isawaitable(value):
            return value
        return self._value(await self._awaited(value, self._timeout_s - (time.monotonic() - began)))

    def _value(self, outcome: _Outcome | None) -> Any:
        if outcome is None:
            raise UserFunctionFailed(f"did not return within {self._setting}.timeout_s = {self._timeout_s:g} s")
        return outcome.result()

    async def _awaited(self, awaitable: Awaitable[Any], seconds: float) -> _Outcome | None:
        """Return how the awaitable ended, or None if it took too long.

        It has a task of its own: a CancelledError that the function raises is then no cancellation of the caller. What
        is still not over some time after it was cancelled is left behind.
        """
        task = asyncio.create_task(_await(awaitable))
        try:
            await asyncio.wait({task}, timeout=seconds if math.isfinite(seconds) else None)
            return task.result() if task.done() else None
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._left_behind.discard)
                await asyncio.wait({task}, timeout=CLEAN_UP_S)


class _Threads:
    """Daemon threads for calls that block, each for one call: the pool's own would hold up the exit of the process.

    A thread cannot be stopped, so the place that a call takes is its thread's and not its caller's, until the thread
    ends or the call is past its time limit. As many threads again may be past it; then no more calls are made.
    """

    def __init__(self, setting: str, workers: int, timeout_s: float) -> None:
        self._setting = setting
        self._workers = workers
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(workers)
        self._late = 0  # threads whose calls are past their time limit

    async def place(self) -> None:
        """Wait for a place. Raises UserFunctionFailed when too many calls hang."""
        await self._places.acquire()
        if self._late < self._workers:
            return
        self._places.release()
        raise UserFunctionFailed(
            f"not called, because {self._late} earlier calls are past {self._setting}.timeout_s and still run, as many "
            f"as {self._setting}.workers; it seems to hang"
        )

    async def call(self, function: Callable[..., Any], prompt: Prompt, argument: Any) -> _Outcome | None:
        """Use a place for one call, and return how it ended, or None if it took too long."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_Outcome | None] = loop.create_future()
        is_late = False

        def free(outcome: _Outcome | None) -> None:
            self._places.release()
            if not done.done():  # It is when the caller was cancelled.
                done.set_result(outcome)

        def expire() -> None:
            nonlocal is_late
            is_late = True
            self._late += 1
            free(None)

        def end(outcome: _Outcome) -> None:
            if is_late:
                self._late -= 1
            else:
                timer.cancel()
                free(outcome)

        def run() -> None:
            outcome = _call(function, prompt, argument)
            with suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(end, outcome)

        timer = loop.call_later(self._timeout_s, expire)
        try:
            threading.Thread(target=run, name=f"{self._setting} {prompt.prompt_id}", daemon=True).start()
        except RuntimeError as error:  # The system grants no more threads.
            end(_Outcome(raised=error))
        return await done


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
