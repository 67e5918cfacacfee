"""Stand-ins for Ray's actor handles within one process: each call is counted, with its bytes and the processor's time.

Everything has a *side*: the driver, the queue, a replica, the trainer. A call through a ``Handle`` runs on the side of
its actor, as do all tasks that it begins. What one side computes, and what crosses between two of them, is in a
``Meter``. Bytes are those of arguments and results as pickle writes them. What a Ray call adds to that is not there.
"""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import contextvars
import inspect
import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import async_rl

# An ObjectRef as Ray pickles it: its id, and the address of its owner.
REFERENCE_BYTES = 200
# From one process to another and into its event loop.
LATENCY_S = 0.001

OURS = str(Path(async_rl.__file__).parent)

SIDE: contextvars.ContextVar[str] = contextvars.ContextVar("side", default="driver")


class Meter:
    """What each side computed, and what crossed between them."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        """Nanoseconds of the processor by side; "loop" is asyncio's own work, "ray" that of what stands in for Ray."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """Calls by the side that made them and the method. Each item of a stream counts as one, of who reads it. Calls
        of ``lease`` that gave nothing are "lease_poll"."""
        self.nbytes: Counter[tuple[str, str]] = Counter()
        """Bytes of arguments and results of the same."""
        self.lines: Counter[str] = Counter()
        """Lines of this project's code that a side has executed, while ``counting_lines``."""
        self._side, self._since = "loop", time.thread_time_ns()

    @contextlib.contextmanager
    def on(self, side: str) -> Iterator[None]:
        """Count the processor's time of the block as that of a side, and not as that of the block around it."""
        before = self._enter(side)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, side: str) -> str:
        now = time.thread_time_ns()
        self.ns[self._side] += now - self._since
        before, self._side, self._since = self._side, side, now
        return before

    def crossed(self, caller: str, method: str, sent: Any, received: Any) -> None:
        """Count a call that ``caller`` has made of another side."""
        with self.on("ray"):
            if method == "lease" and not received:
                method = "lease_poll"
            self.calls[caller, method] += 1
            self.nbytes[caller, method] += size(sent) + size(received)

    @contextlib.contextmanager
    def counting_lines(self) -> Iterator[None]:
        """Count ``lines`` in the block. That takes many times as long as the lines do."""

        def of_ours(frame: Any, event: str, argument: Any) -> Any:
            return line if frame.f_code.co_filename.startswith(OURS) else None

        def line(frame: Any, event: str, argument: Any) -> Any:
            if event == "line":
                self.lines[self._side] += 1
            return line

        sys.settrace(of_ours)
        try:
            yield
        finally:
            sys.settrace(None)

    def copy(self) -> Meter:
        """Return what was counted so far."""
        self._enter(self._side)
        made = Meter()
        for name in ("ns", "calls", "nbytes", "lines"):
            setattr(made, name, getattr(self, name).copy())
        return made

    def since(self, before: Meter) -> Meter:
        """Return what was counted since ``before`` was copied."""
        made = self.copy()
        for name in ("ns", "calls", "nbytes", "lines"):
            getattr(made, name).subtract(getattr(before, name))
        return made


def size(value: Any) -> int:
    """Return the bytes of a value as it is sent to another process; arrays are not copied for that."""
    buffers: list[pickle.PickleBuffer] = []
    return len(pickle.dumps(value, 5, buffer_callback=buffers.append)) + sum(len(each.raw()) for each in buffers)


class Reference:
    """What a call returns at once: awaited, it gives the result. Sent to another side, it is a reference."""

    def __init__(self, task: asyncio.Future[Any]) -> None:
        self._task = task

    def __await__(self) -> Any:
        # The call does not end with what waits for it.
        return asyncio.shield(self._task).__await__()

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(REFERENCE_BYTES),)


class Stream:
    """What a streaming call returns, with the part of Ray's ObjectRefGenerator that the driver uses."""

    def __init__(self, items: AsyncIterator[Any], side: str, method: str, meter: Meter) -> None:
        self._caller, self._method, self._meter = SIDE.get(), method, meter
        self._made: deque[Reference] = deque()
        self._more = asyncio.Event()
        self._task = _start(self._run(items), side)
        self._task.add_done_callback(lambda _: self._more.set())

    async def _run(self, items: AsyncIterator[Any]) -> None:
        loop = asyncio.get_running_loop()
        async for item in items:
            self._meter.crossed(self._caller, self._method, None, item)
            made = loop.create_future()
            made.set_result(item)
            self._made.append(Reference(made))
            self._more.set()

    def next_ready(self) -> bool:
        return bool(self._made)

    def is_finished(self) -> bool:
        return not self._made and self._task.done()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Reference:
        while not self._made:
            if self._task.done():
                self._task.result()
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return self._made.popleft()

    def __next__(self) -> Reference:
        return self._made.popleft()


class Message:
    """The message of a group, which stays in the store of the host that made it: others have a reference."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(REFERENCE_BYTES),)


class Handle:
    """Stands in for the handle of a Ray actor, whose object is ``actor``."""

    def __init__(self, actor: Any, side: str, meter: Meter) -> None:
        self._actor, self._side, self._meter = actor, side, meter

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(getattr(self._actor, name), self._side, self._meter)

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(REFERENCE_BYTES),)


class _Method:
    def __init__(self, method: Any, side: str, meter: Meter) -> None:
        self._method, self._side, self._meter, self._streams = method, side, meter, False

    def options(self, *, num_returns: str) -> _Method:
        self._streams = num_returns == "streaming"
        return self

    def remote(self, *arguments: Any, **named: Any) -> Any:
        caller = SIDE.get()
        with self._meter.on("ray"):
            if self._streams:
                return Stream(self._method(*arguments, **named), self._side, self._method.__name__, self._meter)
            return Reference(_start(self._call(caller, arguments, named), self._side))

    async def _call(self, caller: str, arguments: Any, named: Any) -> Any:
        await asyncio.sleep(LATENCY_S)
        result = self._method(*arguments, **named)
        if inspect.isawaitable(result):
            result = await result
        self._meter.crossed(caller, self._method.__name__, (arguments, named), result)
        return result


def _start(work: Any, side: str) -> asyncio.Task[Any]:
    """Begin a task on a side."""
    context = contextvars.copy_context()
    context.run(SIDE.set, side)
    return asyncio.get_running_loop().create_task(work, context=context)


class _Metered(collections.abc.Coroutine):
    """A coroutine whose steps are counted as those of a side."""

    def __init__(self, work: Any, side: str, meter: Meter) -> None:
        self._work, self._side, self._meter = work, side, meter

    def send(self, value: Any) -> Any:
        with self._meter.on(self._side):
            return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        with self._meter.on(self._side):
            return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Any:
        return self._work.__await__()


def meter_tasks(loop: asyncio.AbstractEventLoop, meter: Meter) -> None:
    """Have each task of ``loop`` count as one of the side that begins it, or of that in the context it is given."""

    def make(loop: asyncio.AbstractEventLoop, work: Any, context: Any = None) -> asyncio.Task[Any]:
        side = SIDE.get() if context is None else context[SIDE]
        return asyncio.Task(_Metered(work, side, meter), loop=loop, context=context)

    loop.set_task_factory(make)
