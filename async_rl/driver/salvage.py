"""Takes the groups in flight from a worker whose engine has died, before the worker's process is ended.

They come as a stream, one group at a time. The driver gets references to messages, which outlive the worker, and passes
these on to its successor. What there is in all may take longer than any fixed time: the limit is on progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import structlog

from async_rl.runtime import timeouts

log = structlog.get_logger(__name__)

# A worker that still responds may be merging what its engine returned last, which takes seconds for hundreds of calls
# of 16,384 tokens. After so many periods of timeouts.ANSWER_S without a group it is given up all the same.
_MOST_PERIODS = 12


class Salvaged(Protocol):
    """What is called of the worker."""

    def salvage(self) -> AsyncIterator[Any]: ...
    def stats(self) -> Awaitable[Any]: ...


async def salvage(worker: Salvaged, name: str) -> dict[str, Any]:
    """Return references to the messages of the groups in flight, by id; those that came before a failure."""
    saved: dict[str, Any] = {}
    try:
        stream = worker.salvage()
        while (named := await _next(stream, worker)) is not None:
            group_id = await named
            message = await _next(stream, worker)
            if message is None:
                break
            saved[group_id] = message
    except Exception as error:  # noqa: BLE001 - after any failure the other groups are issued again
        log.info("salvage_failed", worker=name, saved=len(saved), reason=str(error).partition("\n")[0])
    return saved


async def _next(stream: AsyncIterator[Any], worker: Salvaged) -> Any:
    """Return the stream's next reference once its value is there; None at its end.

    Raises TimeoutError when the worker does not respond, or nothing has come for too long.
    """
    following = asyncio.ensure_future(anext(stream, None))
    try:
        for _ in range(_MOST_PERIODS):
            await asyncio.wait({following}, timeout=timeouts.ANSWER_S)
            if following.done():
                return following.result()
            await asyncio.wait_for(worker.stats(), timeouts.ANSWER_S)
        raise TimeoutError(f"no group within {_MOST_PERIODS * timeouts.ANSWER_S:g} s")
    finally:
        following.cancel()
