"""Where a response ends before its limit: at a stop token, or at the token that completes a stop string.

Judges what every engine returns, so that an engine need not look for either. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from async_rl.rollout.engine.interface import EngineOutput, Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.stop_strings import Decode, StopStrings
from async_rl.types import NOT_SAMPLED, Int32Array


class Stops:
    """Ends responses at stop strings and stop tokens, whether or not the engine has.

    ``own`` are those of ``token_ids`` that the engine does not look for by itself.
    """

    def __init__(
        self, strings: Collection[str], token_ids: Collection[int], decode: Decode, own: Collection[int] = ()
    ) -> None:
        self._strings = tuple(strings)
        self._own = tuple(own)
        self._token_ids = np.array(sorted(token_ids), np.int32)
        self._find = StopStrings(strings, decode) if strings else None

    def sampling(self, base: Sampling, partial: PartialRollout) -> Sampling:
        """Return ``base`` for the next call of ``partial``, with what the engine needs to end it in time."""
        if self._find is None:
            return replace(base, stop_token_ids=self._own) if self._own else base
        start = len(partial.prompt_ids) + _turn_start(partial)
        return replace(base, stop=self._strings, stop_token_ids=self._own, turn_start=start)

    def cut(self, partial: PartialRollout, output: EngineOutput) -> EngineOutput:
        """Return what a call for ``partial`` sampled, up to the first token that ends the response."""
        at = self._end(partial, output.token_ids)
        if at is None:
            return output
        count, beyond = at + 1, len(output.token_ids) - at - 1
        rows = output.routed_experts
        return EngineOutput(
            token_ids=output.token_ids[:count],
            logprobs=output.logprobs[:count],
            versions=output.versions[:count],
            routed_experts=None if rows is None else rows[: len(rows) - beyond],
            finish_reason="stop",
        )

    def _end(self, partial: PartialRollout, new: Int32Array) -> int | None:
        """Return the index among the ``new`` tokens of the one that ends the response; None if none does."""
        stops = np.flatnonzero(np.isin(new, self._token_ids))
        token = int(stops[0]) if len(stops) else None
        if self._find is None:
            return token
        before = partial.response_ids[_turn_start(partial) :][-self._find.window :]
        turn = [*before.tolist(), *new[:token].tolist()]
        string = self._find.first(turn, len(before))
        return token if string is None else string - len(before)


def _turn_start(partial: PartialRollout) -> int:
    """Return where in the response the policy's present turn begins."""
    others = np.flatnonzero(partial.versions == NOT_SAMPLED)
    return int(others[-1]) + 1 if len(others) else 0
