"""Calls one of a run's rewards, with the attempts and limits that the settings allow.

Knows ``config``'s reward section, ``types`` and ``errors``; not how rewards are put together, which is ``runner``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncio_throttle.throttler import Throttler

from async_rl.config.inputs import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards.loader import RewardSpec, load_reward
from async_rl.rollout.rewards.named import NamedReward
from async_rl.rollout.rewards.score import MAX_PARTS, FinishedResponse, Score
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.types import Prompt

# Slow calls at one time, unless reward.workers says. Most wait; each takes a process of 20 MB and what it imports.
_PROCESSES = 32


class OneReward:
    """One function that scores responses.

    Raises RewardError when built if the function cannot be loaded.
    """

    def __init__(self, named: NamedReward, settings: RewardSection) -> None:
        self._named = named
        self._parts: set[str] = set()  # names of the parts seen so far
        reward = load_reward(named)
        self.named = reward.named
        """What the reward asks for by name."""
        self.whole_groups = reward.whole_groups
        """Whether it is called once for all responses of a group."""
        slow = settings.slow if named.slow is None else named.slow
        self._call = UserFunction(
            reward.call,
            RewardSpec.of(named),
            "reward",
            slow=slow,
            timeout_s=settings.timeout_s,
            workers=settings.workers or _PROCESSES,
            retries=settings.retries,
            throttler=Throttler(settings.rate_limit, settings.rate_period_s) if settings.rate_limit else None,
        )

    @property
    def retries(self) -> int:
        """Attempts so far that followed one that failed."""
        return self._call.retried

    @property
    def killed(self) -> int:
        """Calls so far that were killed at reward.timeout_s."""
        return self._call.killed

    def applies_to(self, name: str) -> bool:
        """Return whether it scores responses of this source or evaluation set."""
        return self._named.applies_to is None or name in self._named.applies_to

    def where(self, prompt: Prompt) -> str:
        """Return the beginning of a message about the reward of one prompt."""
        return f"{self._named.setting} {self._named.function}, {at(prompt)}"

    def close(self) -> None:
        """Refuse further calls and end those under way."""
        self._call.close()

    async def score(self, prompt: Prompt, response: FinishedResponse) -> Score | None:
        """Return the score of one response, or None if the reward does not apply.

        Raises RewardError, naming function, row and what it did, after as many attempts as reward.retries allows.
        """
        if self.whole_groups:
            return (await self.score_group(prompt, [response]))[0]
        score: Score | None = await self._called(prompt, response)
        return self._checked(prompt, score)

    async def score_group(self, prompt: Prompt, responses: Sequence[FinishedResponse]) -> list[Score | None]:
        """Return the scores of a group's responses from one call of a reward of whole groups. Raises RewardError."""
        scores: list[Score | None] = await self._called(prompt, tuple(responses))
        if len(scores) != len(responses):
            raise RewardError(
                f"{self.where(prompt)}: returned {len(scores)} rewards for {len(responses)} responses; expected one "
                "for each"
            )
        return [self._checked(prompt, score) for score in scores]

    async def _called(self, prompt: Prompt, argument: Any) -> Any:
        try:
            return await self._call(prompt, argument)
        except UserFunctionFailed as error:
            raise RewardError(f"{self.where(prompt)}: {error}") from error.__cause__

    def _checked(self, prompt: Prompt, score: Score | None) -> Score | None:
        """Raise RewardError if the reward names its parts by what it sees, which would be metrics without end."""
        parts = {} if score is None else score.parts
        if len(self._parts.union(parts)) > MAX_PARTS:
            raise RewardError(
                f"{self.where(prompt)}: returned parts of new names, {', '.join(sorted(set(parts) - self._parts))}; "
                f"each name is a metric, and a reward has at most {MAX_PARTS}: use the same names for every row"
            )
        self._parts.update(parts)
        return score


def at(prompt: Prompt) -> str:
    """Return a prompt as messages name it."""
    return f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
