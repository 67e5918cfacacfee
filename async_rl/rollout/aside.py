"""Work on what an engine call returned, and on what an agent sends, beside the event loop that hands out tokens.

At real size a token has 400 bytes of routed experts, and a weight sync ends hundreds of calls of thousands of tokens at
once. Knows neither worker nor engine.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")

# Work on so many bytes is done on the event loop, within 0.1 ms, which is what a thread costs.
_SMALL_BYTES = 64 * 2**10

DECODED_BYTES = 300
"""A token that is turned into text takes as long as so many bytes of an answer."""

# Threads of a process. They are not asyncio's: there are up to 32 of those, which would take the interpreter's lock in
# turns with the event loop, and whatever else needs one would wait behind hundreds of answers.
_THREADS = 2


async def aside(nbytes: int, work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns, which looks through ``nbytes``; it is done in a thread unless they are few."""
    if nbytes <= _SMALL_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads(), work)


async def in_turn(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns; it is done in one thread for all, in the order of the calls.

    For work with a tokenizer, which one thread uses at a time. In asyncio's threads a thousand agents that ask at one
    time would keep them all, and a weight sync waits for one.
    """
    return await asyncio.get_running_loop().run_in_executor(_thread(), work)


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="templates")


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
