"""The gate before the engine: who enters when, and what counts as busy and as paused."""

import asyncio

import pytest

from async_rl.rollout import stats
from async_rl.rollout.gate import Gate


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time."""
    now = [100.0]
    monkeypatch.setattr(stats.time, "monotonic", lambda: now[0])
    return now


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_no_call_enters_a_closed_gate():
    gate = Gate()
    await gate.enter()
    gate.close()
    late = asyncio.create_task(gate.enter())
    await turns()
    assert (gate.is_open, gate.calls, late.done()) == (False, 1, False)
    gate.open()
    await late
    assert (gate.is_open, gate.calls) == (True, 2)


async def test_quiet_is_when_the_last_call_has_left():
    gate = Gate()
    await asyncio.wait_for(gate.wait_quiet(), 1)
    await gate.enter()
    await gate.enter()
    quiet = asyncio.create_task(gate.wait_quiet())
    gate.leave()
    await turns()
    assert not quiet.done()
    gate.leave()
    await asyncio.wait_for(quiet, 1)


async def test_busy_time_is_that_with_calls_under_way_outside_of_pauses(clock):
    gate = Gate()
    clock[0] += 1  # no call
    await gate.enter()
    clock[0] += 2  # busy
    gate.close()
    clock[0] += 4  # draining: still busy
    gate.start_pause()
    clock[0] += 8  # paused, the call frozen
    assert gate.open() == 8
    clock[0] += 16  # busy
    assert gate.busy_s == 22
    gate.leave()
    clock[0] += 32
    assert (gate.busy_s, gate.paused_s) == (22, 8)


async def test_a_call_that_ends_during_the_pause_is_not_busy_afterwards(clock):
    gate = Gate()
    await gate.enter()
    gate.close()
    gate.start_pause()
    gate.leave()
    clock[0] += 8
    gate.open()
    clock[0] += 16
    assert (gate.busy_s, gate.paused_s) == (0, 8)
    gate.close()
    assert gate.open() == 0, "a gate that was only closed was not paused"


async def test_at_a_resume_calls_enter_one_per_turn_in_the_order_of_their_arrival():
    gate, entered, turn = Gate(), [], 0

    async def call(n):
        await gate.enter()
        entered.append((n, turn))

    gate.close()
    calls = [asyncio.create_task(call(n)) for n in range(9)]
    await turns()
    gate.open()
    while turn < 5:
        turn += 1
        await asyncio.sleep(0)
    gate.close()
    inside = len(entered)
    await turns()
    assert 0 < inside == len(entered) < 9, "nor does one enter that was next when the gate was closed"
    gate.open()
    turn = 6
    await asyncio.gather(*calls)
    assert [n for n, _ in entered] == list(range(9))
    assert len({when for _, when in entered[:inside]}) == inside
