"""Scores responses with the user's reward. Knows ``config``'s reward section, ``types`` and ``errors``."""

from __future__ import annotations

import asyncio

import structlog
from asyncio_throttle.throttler import Throttler

from async_rl.config.schema import RewardSection
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.rewards.code import limit_sandboxes
from async_rl.rollout.rewards.loader import RewardSpec, load_reward
from async_rl.rollout.rewards.score import MAX_PARTS, FinishedResponse, Score
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

# Slow calls at one time, unless reward.workers says. Most wait; each takes a process of 20 MB and what it imports.
_PROCESSES = 32

# Seconds before the second attempt; twice as many before each further one.
_BACK_OFF_S = 0.5


class RewardRunner:
    """Scores responses with the function that ``reward.function`` names.

    Raises RewardError when built if the function cannot be loaded.
    """

    def __init__(self, settings: RewardSection) -> None:
        self._settings = settings
        self.retries = 0
        """Attempts so far that followed one that failed."""
        self._parts: set[str] = set()  # names of the parts seen so far
        limit_sandboxes(settings.workers)
        throttler = Throttler(settings.rate_limit, settings.rate_period_s) if settings.rate_limit else None
        reward = load_reward(settings.function)
        self.needs = reward.named
        """What the reward asks for by name: parts of a response that are not needed may be left out."""
        self._call = UserFunction(
            reward.call,
            RewardSpec.of(settings.function, "reward.function"),
            "reward",
            slow=settings.slow,
            timeout_s=settings.timeout_s,
            workers=settings.workers or _PROCESSES,
            throttler=throttler,
        )

    @property
    def killed(self) -> int:
        """Calls so far that were killed at reward.timeout_s."""
        return self._call.killed

    def close(self) -> None:
        """Refuse further calls and end those under way."""
        self._call.close()

    async def score(self, prompt: Prompt, response: FinishedResponse) -> Score:
        """Return the score of one response, after as many attempts as ``reward.retries`` allows.

        Raises RewardError, naming function, row and what it did, when there is none, and RewardNotApplicable when the
        function returned None.
        """
        where = f"reward.function {self._settings.function}, prompt {prompt.prompt_id} (dataset row {prompt.row})"
        attempt = 0
        while True:
            try:
                score: Score | None = await self._call(prompt, response)
                break
            except UserFunctionFailed as error:
                if not error.may_pass or attempt == self._settings.retries:
                    attempts = f", at {attempt + 1} attempts" if attempt else ""
                    raise RewardError(f"{where}: {error}{attempts}") from error.__cause__
                attempt += 1
                self.retries += 1
                log.info("reward_retried", prompt=prompt.prompt_id, attempt=attempt, reason=str(error))
            await asyncio.sleep(_BACK_OFF_S * 2 ** (attempt - 1))
        if score is None:
            raise RewardNotApplicable(f"{where}: returned None, so the response has no reward")
        self._note_parts(where, score)
        return score

    def _note_parts(self, where: str, score: Score) -> None:
        """Raise RewardError if the reward names its parts by what it sees, which would be metrics without end."""
        if len(self._parts.union(score.parts)) > MAX_PARTS:
            new = sorted(set(score.parts) - self._parts)
            raise RewardError(
                f"{where}: returned parts of new names, {', '.join(new)}; each name is a metric, and a run has at most "
                f"{MAX_PARTS} of them: use the same names for every row"
            )
        self._parts.update(score.parts)
