"""The reward for answers of mathematics, by the package ``math-verify`` (the extra ``math``).

It limits its own time by ``signal.alarm``, which only the main thread of a process may, and computes for long: it runs
in worker processes, whatever ``reward.slow`` says. What its alarm cannot interrupt is killed at ``reward.timeout_s``.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from async_rl.errors import RewardError
from async_rl.rollout.rewards.score import shown_columns
from async_rl.rollout.user_function import in_worker_process
from async_rl.types import Prompt

# Seconds that math-verify spends on one text, and on one comparison; what takes longer counts as wrong. Both its
# defaults, and together well below those of reward.timeout_s.
_LIMIT_S = 5

_LATEX = ("$", "\\boxed", "\\(", "\\[")


if importlib.util.find_spec("math_verify") is None:  # Its import takes seconds: it is left to the worker processes.
    raise RewardError("this reward needs the package math-verify; install async-rl with the extra math, or the package")


@in_worker_process
def math_verify(prompt: Prompt, response: str, *, answer: str | float | None = None) -> float:
    """Return 1.0 if the final answer of the response equals the row's ``answer`` as mathematics; else 0.0.

    The answer is LaTeX, with or without dollar signs, or a plain expression: 1/2, 0.5 and \\frac{1}{2} are equal. A row
    without this column may have ``reward_model.ground_truth``, as verl's have. Raises RewardError for an answer that
    cannot be read, which no response could equal.
    """
    package = importlib.import_module("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # It logs each text that takes too long, whole.
    gold = _answer(prompt, answer)
    marked = gold if any(sign in gold for sign in _LATEX) else f"${gold}$"
    expected = package.parse(marked, parsing_timeout=_LIMIT_S) or package.parse(gold, parsing_timeout=_LIMIT_S)
    if not expected:
        raise RewardError(f"row {prompt.row} has the answer {gold!r:.200}, which math-verify cannot read")
    found = package.parse(response, parsing_timeout=_LIMIT_S)
    return float(package.verify(expected, found, timeout_seconds=_LIMIT_S))


def _answer(prompt: Prompt, answer: Any) -> str:
    if answer is None:
        model = prompt.fields.get("reward_model")
        answer = model.get("ground_truth") if isinstance(model, Mapping) else None
    if not isinstance(answer, str | int | float):
        raise RewardError(
            "the dataset row needs a field 'answer', or reward_model.ground_truth, for this reward; "
            + shown_columns(prompt)
        )
    return str(answer)
