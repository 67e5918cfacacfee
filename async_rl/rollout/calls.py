"""Makes the engine calls of a worker: each waits at the gate, is counted, and its answer is merged beside the loop.

An interruption ends a call early, and no caller sees that: what remains is one more call. Knows the engine and what
ends a response; neither groups nor the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from async_rl.metrics.timeline import Timeline
from async_rl.rollout.aside import DECODED_BYTES, aside
from async_rl.rollout.engine.interface import EngineOutput, RolloutEngine
from async_rl.rollout.gate import Gate
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.prefixes import Computed, computed
from async_rl.rollout.responses import Responses
from async_rl.rollout.stats import WorkerStats
from async_rl.types import ExpertIds, Prompt

ContextTokens = Literal["cached", "new", "weight_sync", "lost"]
"""Tokens sent to an engine, by what it did with them: it had them cached, or computed them for the first time in their
rollout, again because their cache was of earlier weights, or again because the cache had lost them."""


class EngineCalls:
    """Samples with one engine, behind its gate."""

    def __init__(
        self,
        engine: RolloutEngine,
        gate: Gate,
        responses: Responses,
        stats: WorkerStats,
        timeline: Timeline | None = None,
    ) -> None:
        """``stats`` are the counters to add to."""
        self._engine = engine
        self._gate = gate
        self._responses = responses
        self._stats = stats
        self._timeline = timeline
        self.merging: dict[str, asyncio.Task[PartialRollout]] = {}
        """Answers being absorbed, by trajectory id."""
        self.context_tokens: Counter[ContextTokens] = Counter()
        """Those of calls of which the engine says how many were cached."""

    async def sample(
        self,
        prompt: Prompt,
        partial: PartialRollout,
        request_id: str,
        stop: Sequence[str] = (),
        before: Computed = Computed(),  # noqa: B008 - a tuple
    ) -> PartialRollout:
        """Make one engine call for the rest of ``partial``, once the gate is open.

        ``stop`` are strings that end it beside those of the settings and the row. ``before`` is what of the prompt was
        computed before ``partial`` began.
        """
        token_ids, max_tokens, first_row = partial.next_request()
        sampling, stops = self._responses.sampling(partial, prompt, stop)
        await self._gate.enter()
        began = time.monotonic()
        try:
            output = await self._engine.generate(request_id, token_ids, sampling, max_tokens, first_row)
            nbytes = routing_bytes(output.routed_experts)
            nbytes += DECODED_BYTES * len(output.token_ids) if sampling.stop else 0  # it looks for strings
            merged = asyncio.create_task(
                aside(nbytes, lambda: self._responses.absorb(partial, output, stops, sampling))
            )
            self.merging[partial.trajectory_id] = merged
        finally:
            self._gate.leave()
        try:
            self._count(partial, len(token_ids), output, time.monotonic() - began)
            self._count_context(computed(partial) if partial.segments else before, len(token_ids), output)
            return await merged
        finally:
            del self.merging[partial.trajectory_id]

    def _count(self, partial: PartialRollout, context: int, output: EngineOutput, seconds: float) -> None:
        """Count an engine call that was given ``context`` tokens."""
        tokens = len(output.token_ids)
        if self._timeline is not None:
            call = {"trajectory": partial.trajectory_id, "tokens": tokens, "end": output.finish_reason}
            self._timeline.add("call", seconds, **call)
        self._stats.generated_tokens += tokens
        if partial.interrupted and tokens:
            self._stats.resumed_prefill_tokens += context

    def _count_context(self, before: Computed, context: int, output: EngineOutput) -> None:
        """Count the ``context`` tokens that a call was given, of which its rollout had some computed ``before``."""
        if output.cached_tokens is None or not len(output.versions):
            return
        again = max(0, before.tokens - output.cached_tokens)
        self.context_tokens["cached"] += output.cached_tokens
        self.context_tokens["lost" if before.version == output.versions[0] else "weight_sync"] += again
        self.context_tokens["new"] += max(0, context - output.cached_tokens - again)


def routing_bytes(routed_experts: ExpertIds | None) -> int:
    """Return the size of routed experts; 0 for none."""
    return 0 if routed_experts is None else routed_experts.nbytes
