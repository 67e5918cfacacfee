"""The gate before the engine: closed during a weight sync, so that no call begins, and aware of the calls under way.

It also measures how long the engine was busy and how long it was paused. It knows neither engine nor worker.
"""

from __future__ import annotations

import asyncio

from async_rl.rollout.stats import Stopwatch


class Outstanding:
    """How many things have begun and not ended."""

    def __init__(self) -> None:
        self.count = 0
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        """Count one more."""
        self.count += 1
        self._none.clear()

    def end(self) -> None:
        """Count one less."""
        self.count -= 1
        if self.count == 0:
            self._none.set()

    async def wait_none(self) -> None:
        """Return once there is none."""
        await self._none.wait()


class Gate:
    """Admits engine calls while it is open, and counts those that have not ended.

    Order of a pause: ``close``, ``wait_quiet`` where calls are to finish first, ``start_pause``, ..., ``open``.
    """

    def __init__(self) -> None:
        self._gate_open = asyncio.Event()
        self._gate_open.set()
        self._entrance = asyncio.Lock()
        self._calls = Outstanding()
        self._busy, self._paused = Stopwatch(), Stopwatch()

    @property
    def is_open(self) -> bool:
        return self._gate_open.is_set()

    @property
    def calls(self) -> int:
        """Calls that entered and have not left."""
        return self._calls.count

    @property
    def busy_s(self) -> float:
        """Seconds with a call under way, pauses excluded."""
        return self._busy.seconds

    @property
    def paused_s(self) -> float:
        """Seconds from each ``start_pause`` to the ``open`` after it."""
        return self._paused.seconds

    def close(self) -> None:
        """Admit no further call. Calls under way continue and still count as busy time."""
        self._gate_open.clear()

    def start_pause(self) -> None:
        """Count the time from now on as pause, even if calls are under way: the engine does not compute them."""
        self._busy.set(running=False)
        self._paused.set(running=True)

    def open(self) -> float:
        """Admit calls again. Returns the seconds of the pause that ends; 0 if there was none."""
        paused = self._paused.set(running=False)
        self._busy.set(running=self._calls.count > 0)
        self._gate_open.set()
        return paused

    async def wait_open(self) -> None:
        """Return once the gate is open."""
        await self._gate_open.wait()

    async def enter(self) -> None:
        """Wait until the gate is open, then count one more call. Pair it with ``leave``.

        Calls that wait enter in the order of their arrival, one per turn of the event loop: at the end of a weight sync
        there are hundreds, and an engine takes a millisecond to submit thousands of tokens.
        """
        async with self._entrance:
            await self.wait_open()
            self._calls.begin()
        if self._calls.count == 1:
            self._busy.set(running=True)

    def leave(self) -> None:
        """Count one call less."""
        self._calls.end()
        if self._calls.count == 0:
            self._busy.set(running=False)

    async def wait_quiet(self) -> None:
        """Return once no call is under way."""
        await self._calls.wait_none()
