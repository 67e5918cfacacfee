"""Stop strings in the text of tokens, found alike by an engine while it samples and in what it has returned.

Whether a token completes a stop string depends on the last few tokens of the policy's turn alone, and on no boundary
between engine calls: an interrupted response ends where the uninterrupted one does. Pure: how tokens become text is
passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

Decode = Callable[[list[int]], str]

# Tokens before those that a stop string can consist of. What a tokenizer does to the beginning of a text, such as
# stripping a space or showing the rest of a character as U+FFFD, then happens outside of the string.
_SLACK = 4


def decoder(tokenizer: Any) -> Decode:
    """Return how a tokenizer of Transformers shows tokens as they are, special tokens included."""

    def decode(token_ids: list[int]) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


class StopStrings:
    """Looks for strings in the text of tokens."""

    def __init__(self, strings: Collection[str], decode: Decode) -> None:
        self._strings = tuple(strings)
        self._decode = decode
        # A token has at least one byte of text.
        self.window = max(len(string.encode()) for string in strings) + _SLACK
        """How many of the last tokens ``completed_by`` needs."""
        ends = {string[-1] for string in strings}
        # The last bytes of a longer character, or a space that begins a text, show in no token's text alone.
        self._ends = ends if all(end.isascii() and end != " " for end in ends) else None
        self._may_end: dict[int, bool] = {}  # by token

    def completed_by(self, tokens: Sequence[int]) -> str | None:
        """Return the string that the last of ``tokens`` completes, if no token before it has completed one; or None.

        ``tokens`` are the last ``window`` ones of the turn, or all if it has fewer.
        """
        return self._found(tokens) if self._may_complete(tokens[-1]) else None

    def first(self, turn: Sequence[int], start: int) -> int | None:
        """Return the position of the first token from ``start`` on that completes a string; None if there is none."""
        if self._found(turn[max(0, start - self.window) :]) is None:
            return None
        for position in range(start, len(turn)):
            if self.completed_by(turn[max(0, position + 1 - self.window) : position + 1]) is not None:
                return position
        return None

    def _found(self, tokens: Sequence[int]) -> str | None:
        text = self._decode(list(tokens))
        return next((string for string in self._strings if string in text), None)

    def _may_complete(self, token: int) -> bool:
        """Return whether the text of a token has the last character of a stop string."""
        if self._ends is None:
            return True
        if token not in self._may_end:
            text = self._decode([token])
            self._may_end[token] = any(end in text for end in self._ends)
        return self._may_end[token]
