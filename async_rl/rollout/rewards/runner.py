"""Scores responses with the user's reward. Knows ``config``'s reward section, ``types`` and ``errors``."""

from __future__ import annotations

import math
import numbers
from typing import Any

from asyncio_throttle.throttler import Throttler

from async_rl.config.schema import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards.code import limit_sandboxes
from async_rl.rollout.rewards.loader import load_reward
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.types import Prompt

# A group's responses are compared by their rewards, so that there is no place for a response without one.
_EXPECTED = "one finite real number: every response needs a reward"

# Slow calls at one time, unless reward.workers says. Each thread mostly waits; more than a few dozen gain little.
_THREADS = 32


class RewardRunner:
    """Scores responses with the function that ``reward.function`` names.

    Raises RewardError when built if the function cannot be loaded.
    """

    def __init__(self, settings: RewardSection) -> None:
        self._settings = settings
        limit_sandboxes(settings.workers)
        throttler = Throttler(settings.rate_limit, settings.rate_period_s) if settings.rate_limit else None
        self._call = UserFunction(
            load_reward(settings.function),
            "reward",
            slow=settings.slow,
            timeout_s=settings.timeout_s,
            workers=settings.workers or _THREADS,
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


def _finite(value: Any) -> float:
    """Return a real number as a float: Python's, and the scalars and arrays without axes of NumPy and torch.

    Raises ValueError, saying what was returned and what is expected, for all else.
    """
    number = _item(value)
    if not isinstance(number, numbers.Real):
        raise ValueError(f"returned {value!r:.200} of type {type(value).__name__}; expected {_EXPECTED}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"returned {value!r:.200}; expected {_EXPECTED}")
    return number


def _item(value: Any) -> Any:
    """Return the number in an array without axes, which NumPy's scalars and torch's tensors can be; else ``value``."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # noqa: BLE001 - a tensor of the meta device, for example, has none
        return value
