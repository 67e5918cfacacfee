"""Runs a reward without blocking the event loop. Knows ``config``'s reward section, ``types`` and ``errors``.

function          reward.slow   runs
plain             false         at once, on the event loop: for rewards of microseconds
plain             true          in a daemon thread, rate-limited, with a timeout
async def         either        on the event loop, rate-limited, with a timeout
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable
from typing import Any, SupportsFloat

import numpy as np
from asyncio_throttle.throttler import Throttler

from async_rl.config import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards.loader import load_reward
from async_rl.types import Prompt

# Slow calls at one time per replica. Each is a thread that mostly waits; more than a few dozen gain nothing.
MAX_THREADS = 32


class RewardRunner:
    """Scores responses with the function that ``reward.function`` names.

    Raises RewardError when built if the function cannot be loaded or the settings do not fit it.
    """

    def __init__(self, settings: RewardSection) -> None:
        self._settings = settings
        self._function = load_reward(settings.function)
        self._is_async = inspect.iscoroutinefunction(self._function)
        if settings.rate_limit and not (settings.slow or self._is_async):
            raise RewardError(
                f"reward.rate_limit is {settings.rate_limit}, but {settings.function} runs at once, on the event loop, "
                "where nothing limits it; set reward.slow to true or reward.rate_limit to 0"
            )
        self._throttler = Throttler(settings.rate_limit, settings.rate_period_s) if settings.rate_limit else None
        self._slots = asyncio.Semaphore(MAX_THREADS)
        self._abandoned = 0
        self._closed = False

    def close(self) -> None:
        """Take no more calls. Nothing is waited for: threads that still run are daemons and end with the process."""
        self._closed = True

    async def score(self, prompt: Prompt, response: str) -> float:
        """The reward of one response, a finite float; else RewardError naming function, row and what it did."""
        try:
            return _finite(await self._call(prompt, response))
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            did = f"did not return within reward.timeout_s = {self._settings.timeout_s:g} s"
            raise RewardError(self._failure(prompt, did)) from None
        except RewardError as error:
            raise RewardError(self._failure(prompt, str(error))) from error
        except Exception as error:
            raise RewardError(self._failure(prompt, f"raised {type(error).__name__}: {error}")) from error

    async def _call(self, prompt: Prompt, response: str) -> Any:
        if self._closed:
            raise RewardError("not called, because the worker is shutting down")
        if not (self._settings.slow or self._is_async):
            return self._function(prompt, response)
        if self._throttler is not None:
            async with self._throttler:  # Waits here; leaving does nothing: what is limited is how often calls begin.
                pass
        if self._is_async:
            async with asyncio.timeout(self._settings.timeout_s):
                return await _awaitable(self._function(prompt, response))
        async with self._slots:
            return await self._in_thread(prompt, response)

    async def _in_thread(self, prompt: Prompt, response: str) -> Any:
        """Call the function in a daemon thread: one that hangs can be neither stopped nor allowed to hold up the exit
        of the process, which is what a thread pool's workers would do. So it is abandoned, and counted."""
        if self._abandoned >= MAX_THREADS:
            raise RewardError(
                f"{self._abandoned} earlier calls are past reward.timeout_s and still run; it seems to hang"
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
                value = self._function(prompt, response)
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises goes to the caller
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, value, failure)

        threading.Thread(target=run, name=f"reward {prompt.prompt_id}", daemon=True).start()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await done
        except (TimeoutError, asyncio.CancelledError):
            self._abandoned += 1
            raise

    def _failure(self, prompt: Prompt, what: str) -> str:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return f"reward.function {self._settings.function}, {where}: {what}"


async def _awaitable(value: Awaitable[Any] | Any) -> Any:
    return await value


def _finite(value: SupportsFloat | Any) -> float:
    # NumPy's scalars other than float64 are no subclasses of Python's numbers.
    if not isinstance(value, int | float | np.number | np.bool_):
        raise RewardError(f"returned {value!r} of type {type(value).__name__}; it must be a finite number")
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(f"returned {number}; it must be a finite number")
    return number
