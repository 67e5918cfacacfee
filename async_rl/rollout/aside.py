"""Work on what an engine call returned, beside the event loop that hands out tokens.

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

# Threads of a process. They are not asyncio's: there are up to 32 of those, which would take the interpreter's lock in
# turns with the event loop, and whatever else needs one would wait behind hundreds of answers.
_THREADS = 2


async def aside(nbytes: int, work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns, which looks through ``nbytes``; it is done in a thread unless they are few."""
    if nbytes <= _SMALL_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads(), work)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
