"""Rewards that compare the response with the row's ``answer``. Plain functions; know only ``types`` and ``errors``."""

from __future__ import annotations

from async_rl.errors import RewardError
from async_rl.types import Prompt


def exact_match(prompt: Prompt, response: str) -> float:
    """Return 1.0 if the response is the answer, ignoring white space at both ends; else 0.0."""
    return float(response.strip() == _answer(prompt))


def partial_credit(prompt: Prompt, response: str) -> float:
    """Return the share of positions that are right: |{i : response[i] = answer[i]}| / max(|response|, |answer|).

    White space at both ends is left out of both. 1.0 exactly when ``exact_match`` is; an answer and a response that
    are both empty agree. A response that is too long or too short loses the positions by which it is off.
    """
    answer, response = _answer(prompt), response.strip()
    longer = max(len(answer), len(response))
    return sum(a == b for a, b in zip(answer, response, strict=False)) / longer if longer else 1.0


def _answer(prompt: Prompt) -> str:
    answer = prompt.fields.get("answer")
    if not isinstance(answer, str):
        raise RewardError(
            f"the dataset row needs a string field 'answer' for this reward; "
            f"row {prompt.row} has {', '.join(prompt.fields) or 'no fields'}"
        )
    return answer.strip()
