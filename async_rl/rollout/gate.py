"""The gate before the engine: closed during a weight sync, so that no call begins, and aware of the calls under way.

It also measures how long the engine was busy and how long it was paused. It knows neither engine nor worker.
"""

from __future__ import annotations

import asyncio

from async_rl.rollout.stats import Stopwatch


class Gate:
    """Admits engine calls while it is open, and counts those that have not ended.

    Order of a pause: ``close``, ``wait_quiet`` where calls are to finish first, ``start_pause``, ..., ``open``.
    """

    def __init__(self) -> None:
        self._gate_open = asyncio.Event()
        self._gate_open.set()
        self._no_calls = asyncio.Event()
        self._no_calls.set()
        self._calls = 0
        self._busy, self._paused = Stopwatch(), Stopwatch()

    @property
    def is_open(self) -> bool:
        return self._gate_open.is_set()

    @property
    def calls(self) -> int:
        """Calls that entered and have not left."""
        return self._calls

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
        self._busy.set(running=self._calls > 0)
        self._gate_open.set()
        return paused

    async def enter(self) -> None:
        """Wait until the gate is open, then count one more call. Pair it with ``leave``."""
        await self._gate_open.wait()
        self._calls += 1
        self._no_calls.clear()
        if self._calls == 1:
            self._busy.set(running=True)

    def leave(self) -> None:
        """Count one call less."""
        self._calls -= 1
        if self._calls == 0:
            self._no_calls.set()
            self._busy.set(running=False)

    async def wait_quiet(self) -> None:
        """Return once no call is under way."""
        await self._no_calls.wait()
