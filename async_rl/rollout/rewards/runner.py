"""Scores responses with the user's reward. Knows ``config``'s reward section, ``types`` and ``errors``."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import numpy as np
from asyncio_throttle.throttler import Throttler

from async_rl.config.schema import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards.loader import load_reward
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.types import Prompt


class RewardRunner:
    """Scores responses with the function that ``reward.function`` names.

    Raises RewardError when built if the function cannot be loaded.
    """

    def __init__(self, settings: RewardSection) -> None:
        self._settings = settings
        throttler = Throttler(settings.rate_limit, settings.rate_period_s) if settings.rate_limit else None
        self._call = UserFunction(
            load_reward(settings.function),
            "reward",
            slow=settings.slow,
            timeout_s=settings.timeout_s,
            throttler=throttler,
        )

    def close(self) -> None:
        """Refuse further calls."""
        self._call.close()

    async def score(self, prompt: Prompt, response: str) -> float:
        """Return the reward of one response, a finite float.

        Raises RewardError, naming function, row and what it did, when there is none.
        """
        try:
            return _finite(await self._call(prompt, response))
        except UserFunctionFailed as error:
            raise RewardError(self._failure(prompt, str(error))) from error.__cause__
        except ValueError as error:
            raise RewardError(self._failure(prompt, str(error))) from None

    def _failure(self, prompt: Prompt, what: str) -> str:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return f"reward.function {self._settings.function}, {where}: {what}"


def _finite(value: SupportsFloat | Any) -> float:
    # NumPy's scalars other than float64 are no subclasses of Python's numbers.
    if not isinstance(value, int | float | np.number | np.bool_):
        raise ValueError(f"returned {value!r} of type {type(value).__name__}; it must be a finite number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}; it must be a finite number")
    return number
