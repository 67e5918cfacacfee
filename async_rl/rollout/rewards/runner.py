"""Scores responses with the user's reward. Knows ``config``'s reward section, ``types`` and ``errors``."""

from __future__ import annotations

from asyncio_throttle.throttler import Throttler

from async_rl.config.schema import RewardSection
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.rewards.code import limit_sandboxes
from async_rl.rollout.rewards.loader import ARGUMENTS, load_reward
from async_rl.rollout.user_call import FunctionSpec
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.rollout.user_values import real_number
from async_rl.types import Prompt

# Slow calls at one time, unless reward.workers says. Most wait; each takes a process of 20 MB and what it imports.
_PROCESSES = 32


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
            FunctionSpec("reward.function", settings.function, ARGUMENTS, real_number),
            "reward",
            slow=settings.slow,
            timeout_s=settings.timeout_s,
            workers=settings.workers or _PROCESSES,
            retries=settings.retries,
            throttler=throttler,
        )

    @property
    def retries(self) -> int:
        """Attempts so far that followed one that failed."""
        return self._call.retried

    @property
    def killed(self) -> int:
        """Calls so far that were killed at reward.timeout_s."""
        return self._call.killed

    def close(self) -> None:
        """Refuse further calls and end those under way."""
        self._call.close()

    async def score(self, prompt: Prompt, response: str) -> float:
        """Return the reward of one response, a finite float, after as many attempts as ``reward.retries`` allows.

        Raises RewardError, naming function, row and what it did, when there is none, and RewardNotApplicable when the
        function returned None.
        """
        where = f"reward.function {self._settings.function}, prompt {prompt.prompt_id} (dataset row {prompt.row})"
        try:
            reward: float | None = await self._call(prompt, response)
        except UserFunctionFailed as error:
            raise RewardError(f"{where}: {error}") from error.__cause__
        if reward is None:
            raise RewardNotApplicable(f"{where}: returned None, so the response has no reward")
        return reward
