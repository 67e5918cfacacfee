"""Finds the function that ``reward.function`` names. It runs nothing but the import of its module."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from async_rl.config.functions import load_function
from async_rl.errors import RewardError
from async_rl.types import Prompt

RewardFunction = Callable[[Prompt, str], float | None] | Callable[[Prompt, str], Awaitable[float | None]]

ARGUMENTS = ("prompt", "response")


def load_reward(name: str) -> RewardFunction:
    """Import the function that ``reward.function`` names and check that it takes (prompt, response).

    Raises RewardError, naming the setting and the fix, when it cannot be found or called so.
    """
    reward: RewardFunction = load_function("reward.function", name, ARGUMENTS, RewardError)
    return reward
