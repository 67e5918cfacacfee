"""Processes that do not start are named, and a run waits for them no longer than watchdog.abort_s."""

import asyncio
import time

import pytest

from async_rl.config.operation import WatchdogSection
from async_rl.driver.starting import wait_started
from async_rl.errors import EngineError, StalledError


class Events(list):
    def event(self, name, /, **fields):
        self.append((name, fields))


async def free():
    return "2 CPU, 0 GPU"


async def never():
    await asyncio.Event().wait()


async def at_once():
    pass


async def fails():
    raise EngineError("replica 1: no memory")


async def test_what_is_missing_is_named_until_the_run_fails():
    events = Events()
    starting = {"rollout-0": at_once(), "rollout-1": never(), "trainer": never()}
    with pytest.raises(StalledError, match=r"rollout-1, trainer did not start within .* 2 CPU, 0 GPU left"):
        await wait_started(starting, WatchdogSection(stall_s=0.01, abort_s=0.05), events.event, free)
    assert len(events) > 1
    assert {(name, fields["missing"]) for name, fields in events} == {("start_takes_long", "rollout-1, trainer")}


async def test_a_start_that_fails_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(EngineError, match="no memory"):
        await wait_started({"rollout-0": never(), "rollout-1": fails()}, WatchdogSection(), Events().event, free)
    assert time.monotonic() - began < WatchdogSection().stall_s


async def test_starts_in_time_are_no_event():
    events = Events()
    await wait_started({"rollout-0": at_once(), "trainer": at_once()}, WatchdogSection(), events.event, free)
    assert events == []
