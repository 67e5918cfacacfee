"""How a run ends on a signal: at once, or after the time that it asks for."""

import asyncio
import os
import signal

import pytest

from async_rl.runtime.interrupt import Interrupted, until_interrupted


class Work:
    """Waits until it is to wind up, or is cancelled; ``grace_s`` is what it asks for."""

    def __init__(self, *, grace_s=0.0, ends=True):
        self.grace_s, self.ends = grace_s, ends
        self.asked, self.cancelled, self.on_demand = asyncio.Event(), False, 0

    def wind_up(self):
        self.asked.set()
        return self.grace_s

    def demand(self):
        self.on_demand += 1

    async def run(self):
        try:
            await self.asked.wait()
            if not self.ends:
                await asyncio.sleep(3600)
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def until_interrupted(self, *signals):
        task = asyncio.ensure_future(until_interrupted(self.run(), wind_up=self.wind_up, on_demand=self.demand))
        for number in signals:
            await asyncio.sleep(0.01)
            os.kill(os.getpid(), number)
        await task


@pytest.mark.parametrize("times", [1, 2])
async def test_sigterm_lets_the_work_end_by_itself(times):
    work = Work(grace_s=60.0)
    with pytest.raises(Interrupted):
        await work.until_interrupted(*[signal.SIGTERM] * times)
    assert not work.cancelled


@pytest.mark.parametrize(
    ("grace_s", "signals"),
    [
        (0.05, [signal.SIGTERM]),  # the time is over
        (0.0, [signal.SIGTERM]),  # it has nothing to write
        (60.0, [signal.SIGTERM, signal.SIGINT]),
        (60.0, [signal.SIGINT]),
    ],
)
async def test_work_that_does_not_end_is_cancelled(grace_s, signals):
    work = Work(grace_s=grace_s, ends=False)
    with pytest.raises(Interrupted):
        await work.until_interrupted(*signals)
    assert work.cancelled


async def test_sigusr2_asks_for_a_checkpoint_and_ends_nothing():
    work = Work()
    with pytest.raises(Interrupted):
        await work.until_interrupted(signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM)
    assert work.on_demand == 2


async def test_work_that_ends_or_is_cancelled_without_a_signal_is_not_interrupted():
    await until_interrupted(asyncio.sleep(0))
    task = asyncio.ensure_future(until_interrupted(asyncio.sleep(3600)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
