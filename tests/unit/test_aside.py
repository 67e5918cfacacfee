"""Where work on an engine call's answer is done: on the event loop, or in a thread of its own pool."""

import asyncio
import threading

from async_rl.rollout.aside import _SMALL_BYTES, _THREADS, aside, in_turn


async def test_little_work_is_done_at_once_and_much_in_a_thread():
    assert await aside(_SMALL_BYTES, threading.current_thread) is threading.main_thread()
    assert await aside(_SMALL_BYTES + 1, threading.current_thread) is not threading.main_thread()


async def test_hundreds_of_answers_leave_processors_and_the_threads_of_asyncio_to_others():
    at_once, most, may_end = set(), [], threading.Event()

    def work():
        at_once.add(threading.get_ident())
        most.append(len(at_once))
        may_end.wait(10)
        at_once.discard(threading.get_ident())

    answers = [asyncio.create_task(aside(_SMALL_BYTES + 1, work)) for _ in range(300)]
    while len(at_once) < _THREADS:
        await asyncio.sleep(0)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 10) == "done"
    may_end.set()
    await asyncio.gather(*answers)
    assert max(most) == _THREADS


async def test_hundreds_of_templates_are_rendered_in_turn_and_leave_the_threads_of_asyncio_to_others():
    order, threads, may_end = [], set(), threading.Event()

    def work(at):
        may_end.wait(10)
        order.append(at)
        threads.add(threading.get_ident())

    rendered = [asyncio.create_task(in_turn(lambda at=at: work(at))) for at in range(300)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 10) == "done"
    may_end.set()
    await asyncio.gather(*rendered)
    assert order == list(range(300))
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1
