"""A scripted engine that takes what a real one has little of: places, KV cache and prefill.

Its KV cache is in blocks that are found by all tokens up to their end, as vLLM's are. Blocks of calls that have ended
stay until others need them, those unused for longest first. A call waits, behind those before it, until there is a
place and room for all that it will read and sample. Contexts are computed one after the other, at so many tokens a
second; decoding takes its time per token whatever runs beside it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from async_rl.config.schema import RunConfig
from async_rl.rollout.engine.interface import EngineLoad, EngineOutput, PauseMode
from async_rl.types import Int32Array
from tests.support.scripted_engine import Script, ScriptedEngine

BLOCK = 16  # tokens
OTHERS = 9000  # tokens from here on are not the policy's


class BlockCache:
    """Blocks by their key. Pure."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._used: Counter[int] = Counter()  # by key, how many calls read it
        self._cached: OrderedDict[int, None] = OrderedDict()  # which no call reads, longest unused first
        self._own = 0  # of calls under way, not to be found

    @property
    def use(self) -> float:
        """Share of the blocks that calls under way have."""
        return (len(self._used) + self._own) / self.blocks

    def reserve(self, keys: Sequence[int], total: int) -> list[int] | None:
        """Take ``total`` blocks for a call whose context has these ``keys``; None where there are not so many.

        Returns the keys of those that were found.
        """
        found = []
        for key in keys:
            if key not in self._used and key not in self._cached:
                break
            found.append(key)
        revived = sum(key not in self._used for key in found)
        own = total - len(found)
        left = self.blocks - len(self._used) - revived - self._own - own
        if left < 0:
            return None
        for key in found:
            self._cached.pop(key, None)
            self._used[key] += 1
        while len(self._cached) > left:
            self._cached.popitem(last=False)
        self._own += own
        return found

    def release(self, found: Sequence[int], total: int, keys: Sequence[int]) -> None:
        """Give back what ``reserve`` took; blocks with these ``keys`` were computed, and can be found from now on."""
        self._own -= total - len(found)
        for key in found:
            self._used[key] -= 1
            if not self._used[key]:
                del self._used[key]
        for key in reversed(keys):  # the ends of contexts go first
            if key not in self._used:
                self._cached[key] = None
                self._cached.move_to_end(key)


def block_keys(token_ids: Int32Array, version: int) -> list[int]:
    """Return the keys of all whole blocks of a context."""
    keys, last = [], version
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        last = hash((last, token_ids[start : start + BLOCK].tobytes()))
        keys.append(last)
    return keys


@dataclass(frozen=True)
class Speed:
    """What an engine has, and how fast it is."""

    places: int
    kv_tokens: int
    turn: int = 128
    """Tokens of each turn of the policy."""
    prefill_tokens_per_s: float = 20_000.0


@dataclass(eq=False)
class _Waiting:
    keys: list[int]
    total: int
    found: asyncio.Future[list[int] | None]
    """None where a pause has ended the call."""


class KvEngine(ScriptedEngine):
    """See the module. Its turns are as long as ``Speed`` says, and no two trajectories have the same tokens."""

    def __init__(self, config: RunConfig, script: Script, speed: Speed) -> None:
        super().__init__(config, script=script)
        self._speed = speed
        self._cache = BlockCache(speed.kv_tokens // BLOCK)
        self._queue: deque[_Waiting] = deque()
        self._prefill = asyncio.Lock()
        self.computing = 0
        """Calls that have a place."""
        self.place_seconds = 0.0
        """The integral of that over time."""
        self._since = asyncio.get_running_loop().time()

    async def load(self) -> EngineLoad:
        return EngineLoad(len(self._queue), self._cache.use, self._cache.blocks * BLOCK)

    async def pause(self, mode: PauseMode) -> None:
        if mode == "abort":
            self._aborting = True
            while self._queue:
                if not (found := self._queue.popleft().found).done():
                    found.set_result(None)
        await super().pause(mode)

    async def _sample(self, request_id: str, token_ids: Int32Array, max_tokens: int, first_row: int) -> EngineOutput:
        keys = block_keys(token_ids, self.version)
        if len(keys) * BLOCK == len(token_ids):
            keys.pop()  # the last token is computed, for the one after it
        total = -(-(len(token_ids) + min(max_tokens, self._speed.turn)) // BLOCK)
        waiting = _Waiting(keys, total, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._give_places()
        try:
            found = await waiting.found
        except asyncio.CancelledError:
            if not waiting.found.cancelled() and (given := waiting.found.result()) is not None:
                self._give_back(given, total, [])
            raise
        if found is None:
            return await super()._sample(request_id, token_ids, max_tokens, first_row)
        whole, version = token_ids, self.version
        try:
            async with self._prefill:
                await asyncio.sleep((len(token_ids) - len(found) * BLOCK) / self._speed.prefill_tokens_per_s)
            output = await super()._sample(request_id, token_ids, max_tokens, first_row)
            output = dataclasses.replace(output, token_ids=self._unlike(request_id, output.token_ids))
            whole = np.concatenate([token_ids, output.token_ids])[:-1]
            return dataclasses.replace(output, cached_tokens=len(found) * BLOCK)
        finally:
            self._give_back(found, total, block_keys(whole, version))

    def _give_back(self, found: list[int], total: int, keys: list[int]) -> None:
        self._count_places(-1)
        self._cache.release(found, total, keys)
        self._give_places()

    def _give_places(self) -> None:
        while self._queue and self.computing < self._speed.places:
            first = self._queue[0]
            if first.found.done():  # its caller was cancelled
                self._queue.popleft()
                continue
            found = self._cache.reserve(first.keys, first.total)
            if found is None:
                return
            self._queue.popleft()
            self._count_places(+1)
            first.found.set_result(found)

    def _count_places(self, change: int) -> None:
        now = asyncio.get_running_loop().time()
        self.place_seconds += self.computing * (now - self._since)
        self.computing += change
        self._since = now

    def _unlike(self, request_id: str, token_ids: Int32Array) -> Int32Array:
        salt = zlib.crc32(request_id.rpartition("/")[0].encode()) % OTHERS
        ordinary = 1 + (token_ids + salt) % (OTHERS - 1)
        stops = np.isin(token_ids, list(self.stop_token_ids))
        return np.where(stops, token_ids, ordinary).astype(np.int32)

    def last_position(self, trajectory_id: str, response: Int32Array) -> int:
        others = np.flatnonzero(response >= OTHERS)
        return (int(others[-1]) + 1 if len(others) else 0) + self._speed.turn - 1


def of_others(rng: np.random.Generator, count: int) -> list[int]:
    """Return tokens that are not the policy's, such as those of a tool's answer."""
    return rng.integers(OTHERS, OTHERS + 999, count).tolist()
