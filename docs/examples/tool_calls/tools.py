"""A checker that answers the policy between turns, and a reward for how it ended."""

from __future__ import annotations

from async_rl.types import Prompt

MAX_TRIES = 3


def checker(prompt: Prompt, turns: tuple[str, ...]) -> str | None:
    """Return the problem once more after a wrong answer, or None to end the response.

    turns: the response so far; the policy's text, the checker's, ..., the policy's.
    """
    tries = turns[::2]
    if tries[-1].strip() == prompt.fields["answer"] or len(tries) == MAX_TRIES:
        return None
    return f",{prompt.text}"


def last_try(prompt: Prompt, response: str) -> float:
    """Return the share of letters in place in the last try, less a tenth for every try before it."""
    *earlier, last = response.split(f",{prompt.text}")
    answer = prompt.fields["answer"]
    right = sum(a == b for a, b in zip(answer, last.strip(), strict=False)) / max(len(answer), len(last.strip()))
    return right - 0.1 * len(earlier)
