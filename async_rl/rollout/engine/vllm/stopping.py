"""Stop strings in vLLM, whose own search has neither the text of earlier calls nor, here, a tokenizer.

Written for vLLM 0.30, in which a request's detokenizer says in the frontend whether a token has completed a stop
string. The call then ends with that token, its log-prob and its routed experts, and vLLM aborts the request in
the engine core.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from async_rl.rollout.stop_strings import StopStrings
from async_rl.types import Int32Array


class StoppingDetokenizer:
    """Takes the place of a request's detokenizer; ``turn`` are the tokens of the policy's turn from earlier calls."""

    def __init__(self, plain: Any, stops: StopStrings, turn: Int32Array) -> None:
        self._plain = plain
        self._stops = stops
        self._last = deque[int](turn[-stops.window :].tolist(), maxlen=stops.window)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:  # noqa: FBT001 - as vLLM calls it
        """Take new tokens, and return the stop string that one of them completes; see vLLM's detokenizers."""
        self._plain.update(new_token_ids, stop_terminated)
        if stop_terminated:
            return None
        for token in new_token_ids:
            self._last.append(token)
            if (string := self._stops.completed_by(list(self._last))) is not None:
                return string
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)
