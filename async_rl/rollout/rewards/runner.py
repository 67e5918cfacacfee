"""Scores responses with all rewards of a run. Knows ``config``'s reward section, ``types`` and ``errors``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from async_rl.config.inputs import TRAIN, RewardSection
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.rewards.code import limit_sandboxes
from async_rl.rollout.rewards.named import rewards_of
from async_rl.rollout.rewards.one import OneReward, at
from async_rl.rollout.rewards.score import FinishedResponse, Score, weighted_sum
from async_rl.types import Prompt

_Found = TypeVar("_Found")


class RewardRunner:
    """Scores responses with the function that ``reward.function`` names, or those of ``reward.functions``.

    Raises RewardError when built if a function cannot be loaded.
    """

    def __init__(self, settings: RewardSection) -> None:
        limit_sandboxes(settings.workers)
        self._weights = {name: each.weight for name, each in settings.functions.items()}
        self._rewards = [OneReward(named, settings) for named in rewards_of(settings)]
        self.needs = frozenset[str]().union(*(reward.named for reward in self._rewards))
        """What the rewards ask for by name: parts of a response that are not needed may be left out."""
        self.whole_groups = any(reward.whole_groups for reward in self._rewards)
        """Whether a reward is called once for a group, which must be complete then."""

    @property
    def killed(self) -> int:
        """Calls so far that were killed at reward.timeout_s."""
        return sum(reward.killed for reward in self._rewards)

    @property
    def retries(self) -> int:
        """Attempts so far that followed one that failed."""
        return sum(reward.retries for reward in self._rewards)

    def close(self) -> None:
        """Refuse further calls and end those under way."""
        for reward in self._rewards:
            reward.close()

    async def score(self, prompt: Prompt, response: FinishedResponse, source: str = TRAIN) -> Score:
        """Return the score of one response: the weighted sum of the rewards that apply.

        ``source`` is the name of the prompt's source or evaluation set. Raises RewardError, naming function, row and
        what it did, when a reward fails, and RewardNotApplicable when none applies.
        """
        if len(self._rewards) == 1:
            return self._sum(prompt, [await self._of_response(self._rewards[0], prompt, response, source)])
        found = await _all(_or_error(self._of_response(each, prompt, response, source)) for each in self._rewards)
        return _raised(self._combined(prompt, found))

    async def score_group(
        self, prompt: Prompt, responses: Sequence[FinishedResponse], source: str = TRAIN
    ) -> list[Score | RewardError]:
        """Return for each response of a group its score as ``score`` does, or the error that it would raise."""
        by_reward = await _all(self._of_group(each, prompt, responses, source) for each in self._rewards)
        return [self._combined(prompt, found) for found in zip(*by_reward, strict=True)]

    async def _of_response(
        self, reward: OneReward, prompt: Prompt, response: FinishedResponse, source: str
    ) -> Score | None:
        """Return what one reward says of a response; None if it does not apply."""
        return await reward.score(prompt, response) if reward.applies_to(source) else None

    async def _of_group(
        self, reward: OneReward, prompt: Prompt, responses: Sequence[FinishedResponse], source: str
    ) -> Sequence[Score | RewardError | None]:
        """Return what one reward says of each response of a group, or why it says nothing."""
        if not reward.whole_groups:
            return await _all(_or_error(self._of_response(reward, prompt, each, source)) for each in responses)
        if not reward.applies_to(source):
            return [None] * len(responses)
        found = await _or_error(reward.score_group(prompt, responses))
        return [found] * len(responses) if isinstance(found, RewardError) else found

    def _combined(self, prompt: Prompt, found: Sequence[Score | RewardError | None]) -> Score | RewardError:
        """Return the sum of the rewards' scores, or the first error among them, or that none applies."""
        failed = next((each for each in found if isinstance(each, RewardError)), None)
        try:
            return failed or self._sum(prompt, [each for each in found if not isinstance(each, RewardError)])
        except RewardNotApplicable as error:
            return error

    def _sum(self, prompt: Prompt, scores: Sequence[Score | None]) -> Score:
        """Return the sum of the rewards that apply. Raises RewardNotApplicable if none does."""
        total = weighted_sum(self._weights, scores) if self._weights else scores[0]
        if total is None:
            where = self._rewards[0].where(prompt) if len(self._rewards) == 1 else f"reward.functions, {at(prompt)}"
            raise RewardNotApplicable(f"{where}: returned None, so the response has no reward")
        return total


async def _all(calls: Iterable[Coroutine[Any, Any, _Found]]) -> list[_Found]:
    """Make calls at once, and return their results in order. Cancelled, it waits until each has cleaned up."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


async def _or_error(call: Awaitable[_Found]) -> _Found | RewardError:
    """Await a call, and return its RewardError in place of raising it: others are under way beside it."""
    try:
        return await call
    except RewardError as error:
        return error


def _raised(found: Score | RewardError) -> Score:
    if isinstance(found, RewardError):
        raise found
    return found
