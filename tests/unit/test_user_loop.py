"""Async functions on an event loop of their own: one that blocks it does not delay the engine's."""

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from async_rl.rollout import user_loop
from async_rl.rollout.user_call import Outcome, call_async
from async_rl.rollout.user_loop import UserLoop


@pytest.fixture
def gate():
    """What blocks a loop until the end of the test, also of one that fails."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def loop(monkeypatch, gate):
    monkeypatch.setattr(user_loop, "CLEAN_UP_S", 0.05)
    loop = UserLoop("reward")
    yield loop
    loop.close()


def calling(function, *arguments):
    return lambda: call_async(lambda value: value, function, *arguments)


async def blocks(gate: threading.Event) -> bool:
    return gate.wait(600)


async def answers() -> int:
    return threading.get_ident()


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_a_function_that_blocks_its_loop_is_given_up_at_its_time_limit_and_the_next_has_another(loop, gate):
    first = (await loop.call(calling(answers), 60, "a")).value
    with capture_logs() as logs:
        call = asyncio.create_task(loop.call(calling(blocks, gate), 0.05, "prompt 0-17"))
        for _ in range(10):  # This loop runs meanwhile.
            await asyncio.sleep(0)
        assert await call is None
    assert [(entry["event"], entry["blocked_by"], entry["abandoned"]) for entry in logs] == [
        ("event_loop_abandoned", "prompt 0-17", 1)
    ]
    second = (await loop.call(calling(answers), 60, "b")).value
    assert len({first, second, threading.get_ident()}) == 3
    gate.set()
    await until(lambda: loop.abandoned == 0)


async def test_calls_on_a_loop_that_another_has_blocked_fail_and_may_be_tried_again(loop, gate):
    other = asyncio.create_task(loop.call(calling(asyncio.sleep, 600), 600, "b"))
    await asyncio.sleep(0)
    assert await loop.call(calling(blocks, gate), 0.05, "a") is None
    outcome = await other
    assert outcome == Outcome(failure="was ended, because another call has blocked its event loop", may_pass=True)


async def test_loops_that_are_blocked_do_not_pile_up_without_bound(loop, gate):
    for _ in range(user_loop.MAX_BLOCKED):
        assert await loop.call(calling(blocks, gate), 0.01, "a") is None
    refused = await loop.call(calling(answers), 60, "b")
    assert "not called, because 4 earlier calls are past reward.timeout_s and still block" in refused.failure
    gate.set()
    await until(lambda: loop.abandoned == 0)
    assert (await loop.call(calling(answers), 60, "b")).failure is None


async def test_a_coroutine_that_only_waits_is_cancelled_and_its_loop_stays(loop):
    ended = threading.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    first = (await loop.call(calling(answers), 60, "a")).value
    assert await loop.call(calling(waits), 0.01, "a") is None
    assert ended.is_set()
    assert (await loop.call(calling(answers), 60, "b")).value == first
    assert loop.abandoned == 0


async def test_a_task_of_the_function_that_exits_does_not_end_the_loop(loop):
    async def exits() -> None:
        raise SystemExit(3)

    async def begins_another() -> str:
        asyncio.create_task(exits()).add_done_callback(lambda task: task.exception())
        await asyncio.sleep(0.01)
        return "there"

    assert (await loop.call(calling(begins_another), 60, "a")).value == "there"


async def test_close_cancels_what_is_called_and_ends_the_thread(loop):
    call = asyncio.create_task(loop.call(calling(asyncio.sleep, 600), 600, "a"))
    await asyncio.sleep(0)
    thread = loop._thread
    loop.close()
    assert (await call).failure == "raised CancelledError"
    await until(lambda: not thread.is_alive())
