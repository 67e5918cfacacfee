"""Calls a user's function without blocking the event loop. It does not know what the function is for.

function          slow    runs
plain             false   at once, on the event loop: for functions of microseconds
plain             true    in a worker process, which is killed at the time limit (``user_processes``)
async def         either  on an event loop of its own, with a timeout (``user_loop``)

An awaitable that a plain function returns is awaited: in its process, or on the event loop of async functions.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import structlog
from asyncio_throttle.throttler import Throttler

from async_rl.rollout.user_call import FunctionSpec, Outcome, call, call_async
from async_rl.rollout.user_loop import UserLoop
from async_rl.rollout.user_processes import UserProcesses
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

# Seconds before the second attempt; twice as many before each further one.
_BACK_OFF_S = 0.5

_LIMITS_OWN_TIME = "limits_own_time"
_AsyncFunction = TypeVar("_AsyncFunction", bound=Callable[..., Awaitable[Any]])


def limits_own_time(function: _AsyncFunction) -> _AsyncFunction:
    """Mark an async function each of whose calls ends by itself, so that no time limit of the settings holds for it.

    It is meant for a function that waits for a place before it works: under load, the wait would end the call.
    """
    setattr(function, _LIMITS_OWN_TIME, True)
    return function


class UserFunctionFailed(Exception):
    """There is no value: the message says what the function did, or why it was not called.

    ``may_pass`` tells whether another attempt may succeed.
    """

    def __init__(self, what: str, *, may_pass: bool = False) -> None:
        super().__init__(what)
        self.may_pass = may_pass


class UserTraceback(Exception):
    """Where the user's function raised, as text: the cause of an error, which Python prints with it."""


class UserFunction:
    """``function(prompt, argument)``; ``section`` is the config section that messages name, "reward" for example.

    spec: the same function by name, for worker processes. workers: how many of these there may be. retries: further
    attempts at a call that failed in a way that may pass.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        spec: FunctionSpec,
        section: str,
        *,
        slow: bool,
        timeout_s: float,
        workers: int,
        retries: int,
        throttler: Throttler | None = None,
    ) -> None:
        self.retried = 0
        """Attempts so far that followed one that failed."""
        self._retries = retries
        self._function = function
        self._convert = spec.convert
        self._section = section
        self._is_async = _is_async(function)
        self._processes: UserProcesses | None = None
        if slow and not self._is_async:
            self._processes = UserProcesses(spec, section, workers=workers, timeout_s=timeout_s)
        self._loop = UserLoop(section)
        self._timeout_s = math.inf if hasattr(function, _LIMITS_OWN_TIME) else timeout_s
        self._throttler = throttler
        self._next_at_throttler = asyncio.Lock()
        self._closed = False

    @property
    def killed(self) -> int:
        """Calls so far that were killed in their process at the time limit."""
        return 0 if self._processes is None else self._processes.killed

    def close(self) -> None:
        """Refuse further calls and end those under way, without waiting."""
        self._closed = True
        self._loop.close()
        if self._processes is not None:
            self._processes.close()

    async def __call__(self, prompt: Prompt, argument: Any) -> Any:
        """Return what the function returned, as ``spec.convert`` makes it, after as many attempts as there may be.

        Raises UserFunctionFailed when it raised anything, took too long, returned something else or was not called, and
        CancelledError only when the caller is cancelled.
        """
        attempt = 0
        while True:
            try:
                return await self._once(prompt, argument)
            except UserFunctionFailed as error:
                if not error.may_pass or attempt == self._retries:
                    attempts = f", at {attempt + 1} attempts" if attempt else ""
                    raise UserFunctionFailed(f"{error}{attempts}") from error.__cause__
                reason = str(error)
            attempt += 1
            self.retried += 1
            log.info(
                "user_call_retried", setting=self._section, prompt=prompt.prompt_id, attempt=attempt, reason=reason
            )
            await asyncio.sleep(_BACK_OFF_S * 2 ** (attempt - 1))

    async def _once(self, prompt: Prompt, argument: Any) -> Any:
        if self._closed:
            raise UserFunctionFailed("not called, because the worker is shutting down")
        if self._throttler is not None:
            # Each that waits at the throttler polls it a hundred times a second, so one at a time does. Leaving it does
            # nothing: what is limited is how often calls begin.
            async with self._next_at_throttler, self._throttler:
                pass
        outcome = await self._outcome(prompt, argument)
        if outcome is None:
            # A wait may be shorter the next time; what computes in a process takes as long again.
            what = f"did not return within {self._section}.timeout_s = {self._timeout_s:g} s"
            raise UserFunctionFailed(what, may_pass=self._processes is None)
        if outcome.failure is not None:
            cause = UserTraceback(outcome.trace) if outcome.trace else None
            raise UserFunctionFailed(outcome.failure, may_pass=outcome.may_pass) from cause
        return outcome.value

    async def _outcome(self, prompt: Prompt, argument: Any) -> Outcome | None:
        if self._processes is not None:
            return await self._processes.call(prompt, argument)
        if self._is_async:
            return await self._await(lambda: self._function(prompt, argument), self._timeout_s, prompt)
        began = time.monotonic()
        value = call(self._convert, self._function, prompt, argument)
        if isinstance(value, Outcome):  # It waited for nothing, so that another attempt would end in the same way.
            return replace(value, may_pass=False)
        left = self._timeout_s - (time.monotonic() - began)
        if isinstance(value, asyncio.Future):
            return await self._await_here(value, left)
        return await self._await(lambda: value, left, prompt)

    async def _await(self, function: Callable[[], Any], seconds: float, prompt: Prompt) -> Outcome | None:
        return await self._loop.call(lambda: call_async(self._convert, function), seconds, f"prompt {prompt.prompt_id}")

    async def _await_here(self, future: asyncio.Future[Any], seconds: float) -> Outcome | None:
        """Await a future that belongs to this event loop."""
        try:
            done, _ = await asyncio.wait({future}, timeout=seconds if math.isfinite(seconds) else None)
        finally:
            future.cancel()
        return await call_async(self._convert, lambda: future) if done else None


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling the function only makes a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
