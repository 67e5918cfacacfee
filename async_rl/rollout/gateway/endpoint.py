"""What the gateway holds for one rollout: its policy, and the requests whose answers clients wait for.

A turn belongs to the rollout and not to the connection that has asked for it: clients repeat a request after a
time-out of theirs, and then get the answer to the first. Knows policies, not HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from async_rl.errors import RequestRefused
from async_rl.rollout.policy import Policy, Reply

REPEAT_WITHIN_S = 60.0
"""Seconds for which a turn is sampled on although no client waits for it. OpenAI's clients repeat after at most 8."""


Key = tuple[str, bytes]
"""What was asked for: the kind of request and its body. Equal for a request and its repetition."""


class Asked:
    """One turn, and those who wait for it."""

    def __init__(self, turn: asyncio.Task[Reply]) -> None:
        self.turn = turn
        self.waiting = 0


class Endpoint:
    """One rollout at the gateway."""

    def __init__(self, policy: Policy, failed: asyncio.Future[Exception]) -> None:
        self.policy = policy
        self.failed = failed
        """Gets the exception of a turn for which the rollout must fail."""
        self.calls = 0
        """Calls under way."""
        self.closed = False
        self._asked: dict[Key, Asked] = {}  # the last of those not answered, by what was asked
        self._turns: set[asyncio.Task[Reply]] = set()  # under way

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Count a call while this runs."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    def known(self, key: Key, *, repeats: bool) -> Asked | None:
        """Return the turn whose answer a request should have that asks for ``key``; None if it asks for a new one.

        ``repeats``: its sender says that it repeats one. Where the others have lost their connection, it does as well;
        else an equal request is a second sample.
        """
        asked = self._asked.get(key)
        return asked if asked is not None and (repeats or not asked.waiting) else None

    def ask(self, key: Key, ask: Callable[[], Coroutine[Any, Any, Reply]]) -> Asked:
        """Begin a turn."""
        asked = Asked(asyncio.create_task(ask()))
        self._asked[key] = asked
        self._turns.add(asked.turn)
        asked.turn.add_done_callback(lambda _: self._ended(key, asked))
        return asked

    def leave(self, key: Key, asked: Asked, *, answered: bool) -> None:
        """Note that a client waits no longer, because of the answer or of a lost connection."""
        asked.waiting -= 1
        if answered:
            self._forget(key, asked)
        elif not asked.waiting and not asked.turn.done():
            loop = asyncio.get_running_loop()
            loop.call_later(REPEAT_WITHIN_S, lambda: asked.waiting or asked.turn.cancel())

    async def close(self) -> None:
        """Give up every turn under way; none may begin any more."""
        self.closed = True
        turns = list(self._turns)
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)

    def _ended(self, key: Key, asked: Asked) -> None:
        self._turns.discard(asked.turn)
        error = None if asked.turn.cancelled() else asked.turn.exception()
        if asked.turn.cancelled() or error is not None:
            self._forget(key, asked)
        if isinstance(error, Exception) and not isinstance(error, RequestRefused) and not self.failed.done():
            self.failed.set_result(error)

    def _forget(self, key: Key, asked: Asked) -> None:
        if self._asked.get(key) is asked:
            del self._asked[key]
