"""Worker processes for functions that block, on loky: a call that hangs is killed, with its process, at its time limit.

Each process has an executor of its own, with one worker, so that the end of one is not felt by the others. It is
started when a call waits and none is idle, one at a time: functions of milliseconds need few. loky replaces a process
whose memory has grown by 300 MB, between two calls. The function runs in the main thread of its process, so that
signals work in it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.synchronize
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import loky
import loky.backend.synchronize
import structlog
from loky import ProcessPoolExecutor as Executor

from async_rl.rollout import user_call
from async_rl.rollout.user_call import FunctionSpec, Outcome
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

# Seconds for a process to start and to import the function's module; a verifier with a large library takes ten.
START_S = 300.0

# Seconds for a call whose caller was cancelled to end by itself, before its process is killed: most do, and a process
# that has imported the function's module is worth keeping.
GRACE_S = 1.0

_EXIT = re.compile(r"exit codes of the workers are \{(.*)\}")


def _semaphore_name() -> str:
    """Return a name as multiprocessing makes it, for a semaphore of this process."""
    prefix = multiprocessing.current_process()._config["semprefix"]  # type: ignore[attr-defined]
    return f"{prefix}-{next(multiprocessing.synchronize.SemLock._rand)}"  # type: ignore[attr-defined]


# A patch of loky 3.7: its import gives names of its own to its semaphores and to all of multiprocessing's, vLLM's among
# them, which would then be left behind in shared memory when a run is killed (see ``runtime.process.mark_semaphores``).
for _module in (multiprocessing.synchronize, loky.backend.synchronize):
    _module.SemLock._make_name = staticmethod(_semaphore_name)


class UserProcesses:
    """At most ``workers`` processes, each with one call at a time; further calls wait.

    ``timeout_s`` is the time limit of a call, which begins when a process is ready for it; ``section`` is the config
    section that the log names.
    """

    def __init__(self, spec: FunctionSpec, section: str, *, workers: int, timeout_s: float) -> None:
        self._spec = spec
        self._section = section
        self._workers = workers
        self._timeout_s = timeout_s
        self._alive: set[Executor] = set()
        self._idle: asyncio.LifoQueue[Executor | Outcome] = asyncio.LifoQueue()  # an Outcome: why a start failed
        self._waiting = 0
        self._start: asyncio.Task[None] | None = None
        self._cancelled: set[asyncio.Task[None]] = set()  # calls without a caller; the loop keeps weak references only
        self._closed = False
        self.killed = 0
        """Calls so far that took too long and were killed."""

    def close(self) -> None:
        """Kill all processes, without waiting for their end. What is being called fails."""
        self._closed = True
        for executor in list(self._alive):
            self._kill(executor)
        for _ in range(self._waiting):
            self._idle.put_nowait(_CLOSING)

    async def call(self, prompt: Prompt, argument: Any) -> Outcome | None:
        """Return how a call in a worker process ended, or None if it took too long and was killed."""
        plain = replace(prompt, fields=dict(prompt.fields))  # A read-only view cannot be pickled.
        executor = await self._ready()
        if isinstance(executor, Outcome):
            return executor
        asked = _submit(executor, user_call.run, self._spec, plain, argument, self._timeout_s)
        try:
            await asyncio.wait({asked}, timeout=self._timeout_s)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._end_soon(executor, asked))
            self._cancelled.add(task)
            task.add_done_callback(self._cancelled.discard)
            raise
        if asked.done():
            return self._outcome(executor, asked)
        self._kill(executor)
        self.killed += 1
        log.warning("user_process_killed", setting=self._section, prompt=prompt.prompt_id, limit_s=self._timeout_s)
        return None

    # -- calls ----------------------------------------------------------------------------------------------------

    def _outcome(self, executor: Executor, asked: asyncio.Future[Outcome]) -> Outcome:
        """Return how a call ended that is over. Its process is idle then, unless it is dead."""
        error = asked.exception()
        if self._closed:
            return _CLOSING
        if isinstance(error, BrokenProcessPool):
            self._kill(executor)
            return Outcome(failure=f"ended its process: {_exit(error)}")
        self._idle.put_nowait(executor)
        if error is not None:
            return Outcome(failure=f"cannot be called in a worker process: {type(error).__name__}: {error}")
        return asked.result()

    async def _end_soon(self, executor: Executor, asked: asyncio.Future[Outcome]) -> None:
        """Give a call whose caller was cancelled some time to end, then kill it."""
        await asyncio.wait({asked}, timeout=GRACE_S)
        if asked.done():
            self._outcome(executor, asked)
        else:
            self._kill(executor)

    # -- processes ------------------------------------------------------------------------------------------------

    async def _ready(self) -> Executor | Outcome:
        """Return a process that has imported the function, or why there is none."""
        while not self._closed:
            if self._idle.empty():
                self._start_another()
            self._waiting += 1
            try:
                found = await self._idle.get()
            finally:
                self._waiting -= 1
            if isinstance(found, Outcome):
                return found
            # It may have died while it was idle, and loky may have replaced it: that is not the call's time.
            asked = _submit(found, user_call.prepare, self._spec)
            try:
                await asyncio.wait({asked}, timeout=START_S)
            except asyncio.CancelledError:
                self._idle.put_nowait(found)
                raise
            if asked.done() and asked.exception() is None:
                return found
            self._kill(found)
        return _CLOSING

    def _start_another(self) -> None:
        if self._start is None and len(self._alive) < self._workers and not self._closed:
            self._start = asyncio.create_task(self._start_one())

    async def _start_one(self) -> None:
        """Start a process, and give it to a call that waits; or the reason why it did not start."""
        executor: Executor | None = None
        try:
            opened, future = await asyncio.to_thread(self._open)
            executor = opened
            self._alive.add(opened)
            asked = asyncio.wrap_future(future)
            await asyncio.wait({asked}, timeout=START_S)
            started = asked.result() if asked.done() else Outcome(failure=f"it took more than {START_S:g} s")
        except Exception as error:  # noqa: BLE001 - each call that waits gets it as its failure
            started = Outcome(failure=_exit(error))
        self._start = None
        if started.failure is not None:
            if executor is not None:
                self._kill(executor)
            if self._waiting > self._idle.qsize():
                self._idle.put_nowait(replace(started, failure=f"not called in a worker process: {started.failure}"))
        elif executor is not None:
            self._idle.put_nowait(executor)
        if self._closed and executor is not None:
            self._kill(executor)
        if self._waiting > self._idle.qsize():
            self._start_another()

    def _open(self) -> tuple[Executor, Future[Outcome]]:
        """Start a process. Blocks for milliseconds; the thread must not end before the process, which it would kill."""
        executor = Executor(1, initializer=user_call.begin_worker, initargs=(os.getpid(),))
        return executor, executor.submit(user_call.prepare, self._spec)

    def _kill(self, executor: Executor) -> None:
        """Kill a process with all that it has started."""
        self._alive.discard(executor)
        executor.shutdown(wait=False, kill_workers=True)
        if self._waiting > self._idle.qsize():
            self._start_another()


def _submit(executor: Executor, function: Callable[..., Outcome], *arguments: Any) -> asyncio.Future[Outcome]:
    """Submit a call; a process that is dead already makes it fail like one that dies later."""
    asked: asyncio.Future[Outcome]
    try:
        asked = asyncio.wrap_future(executor.submit(function, *arguments))
    except Exception as error:  # noqa: BLE001 - see above
        asked = asyncio.get_running_loop().create_future()
        asked.set_exception(error)
    asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # Else asyncio logs it.
    return asked


def _exit(error: BaseException) -> str:
    """Return how a process ended, for example ``SIGKILL(-9)``."""
    found = _EXIT.search(str(error))
    return found[1] if found else f"{type(error).__name__}: {error}"


_CLOSING = Outcome(failure="not called, because the worker is shutting down")
