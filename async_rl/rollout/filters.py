"""Decides which finished groups would teach nothing, as ``rollout.filter`` says. Pure.

It judges rewards as the reward functions returned them: a penalty for length, which differs within every group, must
not hide that all answers are equally right. The worker asks it before a group is encoded; the broker counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from async_rl.config.rollouts import FilterSection
from async_rl.errors import RewardError
from async_rl.rollout.in_flight import InFlight
from async_rl.types import FinishReason, Prompt, RolloutRecord


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """What ``rollout.filter`` may see of a group: its prompt, and one value of each kind for each trainable rollout."""

    prompt: Prompt
    rewards: tuple[float, ...]
    """As the reward functions returned them, without the penalty of reward.overlong_tokens."""
    reward_parts: tuple[Mapping[str, float], ...]
    finish_reasons: tuple[FinishReason, ...]
    response_tokens: tuple[int, ...]

    @classmethod
    def of(cls, group: InFlight, rollouts: Mapping[int, RolloutRecord]) -> FinishedGroup:
        """Describe a group that is to be published with these of its rollouts, by index."""
        trainable = {index: rollout for index, rollout in rollouts.items() if rollout.trainable}
        scores = {index: group.scores[index] for index in trainable}
        return cls(
            prompt=group.ticket.prompt,
            rewards=tuple(trainable[i].reward if score is None else score.unshaped for i, score in scores.items()),
            reward_parts=tuple(each.reward_parts for each in trainable.values()),
            finish_reasons=tuple("length" if each.end == "truncated" else "stop" for each in trainable.values()),
            response_tokens=tuple(sum(len(t.response_ids) for t in each.trajectories) for each in trainable.values()),
        )

    @property
    def mean_reward(self) -> float:
        """The mean of ``rewards``."""
        return sum(self.rewards) / len(self.rewards)


class GroupFilter:
    """The rule of ``rollout.filter``; ``function`` is the user's, imported."""

    def __init__(self, settings: FilterSection, function: Callable[[FinishedGroup], object] | None = None) -> None:
        self._settings = settings
        self._function = function

    def reason(self, group: FinishedGroup) -> str | None:
        """Return why a group is filtered, the first setting that applies; None if it is to be trained.

        Raises RewardError, naming function and row, where the user's function raises or returns no truth value.
        """
        settings = self._settings
        if settings.all_truncated and all(reason == "length" for reason in group.finish_reasons):
            return "all_truncated"
        if settings.zero_variance and min(group.rewards) == max(group.rewards):
            return "zero_variance"
        if settings.mean_reward is not None:
            low, high = settings.mean_reward
            if not low <= group.mean_reward <= high:
                return "mean_reward"
        return None if self._function is None or self._keeps(self._function, group) else "function"

    def _keeps(self, function: Callable[[FinishedGroup], object], group: FinishedGroup) -> bool:
        where = f"rollout.filter.function {self._settings.function}, row {group.prompt.row}"
        try:
            kept = function(group)
        except Exception as error:
            raise RewardError(f"{where}: raised {type(error).__name__}: {error}") from error
        # NumPy's booleans are none of Python's.
        if not isinstance(kept, bool) and type(kept).__name__ not in ("bool", "bool_"):
            raise RewardError(f"{where}: returned {kept!r:.200}; expected true to train the group, false to filter it")
        return bool(kept)
