"""An event loop whose time passes only when nothing is left to do: waiting takes no time, and there are no races.

``time.monotonic`` and the loop's own clock show one time, which begins at 1,000 s. Threads of ``asyncio.to_thread`` are
not started: their work is done at once, in the loop's own thread, so that time never passes beside it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


class _Idle(selectors.DefaultSelector):
    """A selector that does not wait: it says how long there was nothing to do."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        super().__init__()
        self._passed = passed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if events := super().select(0):
            return events
        if timeout is None:
            raise AssertionError("a deadlock: nothing is left that could happen")
        self._passed(timeout)
        return []


class _AtOnce(concurrent.futures.ThreadPoolExecutor):
    """An executor that does what it is given before it returns."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - is raised where the future is awaited
            future.set_exception(error)
        return future


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Idle(self._pass))
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        return self.now

    def _pass(self, seconds: float) -> None:
        self.now += max(0.0, seconds)


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` in virtual time. Raises AssertionError when nothing is left that could happen before it ends."""
    loop = VirtualLoop()
    with patch.object(time, "monotonic", loop.time), asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop))
