"""What a reward makes of responses that are too long. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from async_rl.config.inputs import RewardSection
from async_rl.rollout.rewards.score import FinishedResponse, Score

PART = "overlong"


@dataclass(frozen=True, slots=True)
class Overlong:
    """The rule of ``reward.truncated`` and ``reward.overlong_tokens``."""

    settings: RewardSection

    def leaves_out(self, response: FinishedResponse) -> bool:
        """Return whether a response is left out of its group because it was cut off."""
        return self.settings.truncated == "leave_out" and response.finish_reason == "length"

    def shape(self, response: FinishedResponse, score: Score, limit: int) -> Score:
        """Return the score of a response of at most ``limit`` tokens with its penalty, which becomes a part of it.

        DAPO's soft overlong punishment, arXiv:2503.14476, equation 13, times ``reward.overlong_penalty``: 0 up to
        ``limit - overlong_tokens`` tokens, then falling linearly, to -1 at the limit.
        """
        buffer = self.settings.overlong_tokens
        if not buffer:
            return score
        over = response.tokens - (limit - buffer)
        penalty = -self.settings.overlong_penalty * min(max(over / buffer, 0.0), 1.0)
        return replace(score, reward=score.reward + penalty, parts={**score.parts, PART: penalty}, raw=score.reward)
