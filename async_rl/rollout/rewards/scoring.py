"""From finished responses to their scores: what rewards may see, what they say, and what the settings make of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from async_rl.config.inputs import Terms
from async_rl.config.schema import RunConfig
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.rewards.overlong import Overlong
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse, Score
from async_rl.types import Prompt


class Scoring:
    """Scores responses with the run's rewards; ``tokenizer`` turns them into text."""

    def __init__(self, config: RunConfig, tokenizer: Any, rewards: RewardRunner) -> None:
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._overlong = Overlong(config.reward)

    async def in_evaluation(self, prompt: Prompt, response: PartialRollout, terms: Terms) -> Score:
        """Return what the rewards say of a response. Raises RewardError, and RewardNotApplicable if it has none."""
        return await self._rewards.score(prompt, self._finished(response), terms.name)

    async def in_training(self, prompt: Prompt, response: PartialRollout, terms: Terms) -> Score:
        """Return the score that a response is trained with: cut off or very long, it may have less, or none.

        Raises RewardError, and RewardNotApplicable if it has none.
        """
        finished = self._finished(response)
        if self._overlong.leaves_out(finished):
            raise _cut_off(prompt)
        score = await self._rewards.score(prompt, finished, terms.name)
        return self._overlong.shape(finished, score, terms.max_response_tokens)

    async def of_group(
        self, prompt: Prompt, responses: Sequence[PartialRollout], terms: Terms
    ) -> list[Score | RewardError]:
        """Return for each response of a group what ``in_training`` returns or raises, from one call of the rewards."""
        finished = [self._finished(response) for response in responses]
        asked = [each for each in finished if not self._overlong.leaves_out(each)]
        answers = iter(await self._rewards.score_group(prompt, asked, terms.name) if asked else ())
        found: list[Score | RewardError] = []
        for each in finished:
            score = _cut_off(prompt) if self._overlong.leaves_out(each) else next(answers)
            if not isinstance(score, RewardError):
                score = self._overlong.shape(each, score, terms.max_response_tokens)
            found.append(score)
        return found

    def _finished(self, response: PartialRollout) -> FinishedResponse:
        """Return what rewards may see of a response, as far as those of the run ask for it."""
        assert response.finish_reason is not None
        needs, ids = self._rewards.needs, response.response_ids
        turns = response.turns if "turns" in needs else ()
        return FinishedResponse(
            self._tokenizer.decode(ids, skip_special_tokens=True),
            response.finish_reason,
            tuple(self._tokenizer.decode(turn, skip_special_tokens=True) for turn in turns),
            ids.copy() if "completion_ids" in needs else None,
            len(ids),
        )


def _cut_off(prompt: Prompt) -> RewardNotApplicable:
    return RewardNotApplicable(
        f"reward.truncated is leave_out, and a response to prompt {prompt.prompt_id} (dataset row {prompt.row}) ended "
        "at rollout.max_response_tokens"
    )
