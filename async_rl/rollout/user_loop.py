"""Event loops of their own, in threads, for functions that are async: what blocks there does not delay the engine's.

A thread cannot be stopped. One whose loop a call blocks past the call's time limit is given up: the next call begins a
new one, and the old thread ends when it is no longer blocked. ``MAX_BLOCKED`` bounds how many there may be. They share
the interpreter's lock with the process: what computes for long belongs into a plain function.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

import structlog

from async_rl.rollout.user_call import Outcome

log = structlog.get_logger(__name__)

# Seconds for a coroutine that is cancelled to clean up; the sandbox of a code reward takes up to four to end a program.
CLEAN_UP_S = 5.0

# Threads that may be blocked at one time. Each may keep a core and the interpreter's lock busy.
MAX_BLOCKED = 4

Make = Callable[[], Awaitable[Outcome]]


class UserLoop:
    """Runs coroutines in a thread of their own; ``setting`` is the config section that messages name."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._thread: _LoopThread | None = None
        self._blocked: list[_LoopThread] = []

    @property
    def abandoned(self) -> int:
        """How many threads are blocked by calls past their time limit now."""
        self._blocked = [thread for thread in self._blocked if thread.is_alive()]
        return len(self._blocked)

    def close(self) -> None:
        """Cancel all calls, without waiting: the threads are daemons."""
        for thread in (self._thread, *self._blocked):
            if thread is not None:
                thread.stop()

    async def call(self, make: Make, seconds: float, what: str) -> Outcome | None:
        """Return how the coroutine that ``make`` makes ended; None if it took more than ``seconds``, and was cancelled.

        When the caller is cancelled, the coroutine is too. ``what`` names the call in the log.
        """
        if self.abandoned >= MAX_BLOCKED:
            return Outcome(
                failure=f"not called, because {self.abandoned} earlier calls are past {self._setting}.timeout_s and "
                "still block their event loops; it seems to hang. Make it a plain function that is slow, which can be "
                "killed"
            )
        if self._thread is None or not self._thread.is_alive():
            self._thread = _LoopThread(self._setting)
        thread, ended = self._thread, Future[Outcome]()
        thread.begin(ended, make)
        waiter = asyncio.wrap_future(ended)
        try:
            await asyncio.wait({waiter}, timeout=seconds if math.isfinite(seconds) else None)
            return waiter.result() if waiter.done() else None
        finally:
            if not waiter.done():
                reached = thread.cancel(ended)
                await asyncio.wait({waiter}, timeout=CLEAN_UP_S)
                if not waiter.done() and not reached.is_set():
                    self._abandon(thread, what)

    def _abandon(self, thread: _LoopThread, what: str) -> None:
        """Give up a thread whose loop does not turn, and fail the calls that wait for it."""
        if thread is not self._thread:
            return
        self._thread = None
        self._blocked.append(thread)
        thread.stop()
        lost = thread.fail_all(
            Outcome(failure="was ended, because another call has blocked its event loop", may_pass=True)
        )
        log.warning(
            "event_loop_abandoned", setting=self._setting, blocked_by=what, lost_calls=lost, abandoned=self.abandoned
        )


class _LoopThread(threading.Thread):
    """A daemon thread that runs an event loop until ``stop``."""

    def __init__(self, setting: str) -> None:
        super().__init__(name=f"{setting} event loop", daemon=True)
        self._setting = setting
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[Future[Outcome], asyncio.Task[Outcome] | None] = {}
        self._stopping = False
        self.start()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._stopping:
            try:
                self._loop.run_forever()
            except BaseException as error:  # noqa: BLE001 - a SystemExit of a task that the user's function has made
                log.warning("user_task_raised", setting=self._setting, error=repr(error))
        with suppress(BaseException):
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=CLEAN_UP_S))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def begin(self, ended: Future[Outcome], make: Make) -> None:
        """Have the loop run what ``make`` makes, and set ``ended``."""
        self._tasks[ended] = None
        self._soon(partial(self._begin, ended, make))

    def cancel(self, ended: Future[Outcome]) -> threading.Event:
        """Have the loop cancel a call. The event is set when the loop has: a loop that is blocked never does."""
        reached = threading.Event()

        def cancel() -> None:
            task = self._tasks.get(ended)
            if task is not None:
                task.cancel()
            reached.set()

        self._soon(cancel)
        return reached

    def fail_all(self, outcome: Outcome) -> int:
        """End all calls for their callers, and return how many there were."""
        calls = list(self._tasks)
        for ended in calls:
            _set(ended, outcome)
        return len(calls)

    def stop(self) -> None:
        """Have the loop cancel all calls and end, as soon as it can."""
        self._stopping = True
        self._soon(self._loop.stop)

    def _soon(self, callback: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(callback)

    def _begin(self, ended: Future[Outcome], make: Make) -> None:
        task = self._loop.create_task(_awaited(make))
        self._tasks[ended] = task
        task.add_done_callback(partial(self._end, ended))

    def _end(self, ended: Future[Outcome], task: asyncio.Task[Outcome]) -> None:
        del self._tasks[ended]
        _set(ended, Outcome.of(asyncio.CancelledError()) if task.cancelled() else task.result())


async def _awaited(make: Make) -> Outcome:
    return await make()


def _set(future: Future[Outcome], outcome: Outcome) -> None:
    with suppress(InvalidStateError):  # It was given up by its caller, or ended by the other thread.
        future.set_result(outcome)
