"""What a reward may see of a response, and what a response is worth. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.rollout.user_values import is_real, real_number
from async_rl.types import FinishReason, Int32Array, Prompt

MAX_PARTS = 32
"""Names of parts that a reward may use: each is a time series of /metrics and travels with each group."""

MAX_NAME = 60
"""Characters of a part's name."""

_REWARD_KEYS = ("score", "reward")


@dataclass(frozen=True, slots=True)
class FinishedResponse:
    """A response that has ended, as rewards see it."""

    text: str
    """All its tokens as text, those of an environment included."""
    finish_reason: FinishReason = "stop"
    turns: tuple[str, ...] = ()
    """The texts of its turns, in alternation of policy and environment; empty unless a reward asks for them."""
    completion_ids: Int32Array | None = None
    """int32[G], its tokens; None unless a reward asks for them."""
    tokens: int = 0
    """G."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one response, and the numbers that it was made of or that came with it, by name."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    raw: float | None = None
    """The reward before ``overlong`` shaped it; None where it did not."""

    @property
    def unshaped(self) -> float:
        """The reward as the reward functions returned it."""
        return self.reward if self.raw is None else self.raw


def score_of(value: Any) -> Score | None:
    """Return what a reward returned as a score: a number, or a mapping of named parts; None stays None.

    Of a mapping, ``score`` or ``reward`` is the reward, each other number a part; texts and None are left out. Raises
    ValueError, naming the keys, for a mapping without exactly one reward, too many parts or a part that is not finite,
    and as ``real_number`` does for all else.
    """
    if not isinstance(value, Mapping):
        number = real_number(value)
        return None if number is None else Score(number)
    keys = ", ".join(f"{key!r:.{MAX_NAME}}" for key in list(value)[:MAX_PARTS]) or "none"
    found = [key for key in _REWARD_KEYS if key in value]
    if len(found) != 1:
        many = "both 'score' and 'reward'" if found else "neither 'score' nor 'reward'"
        raise ValueError(f"returned a mapping with {many}, of which one must be the reward; its keys are {keys}")
    if len(value) > MAX_PARTS:
        raise ValueError(f"returned a mapping of {len(value)} keys, and at most {MAX_PARTS} can be metrics: {keys}")
    reward = _part(found[0], value[found[0]])
    if reward is None:
        return None
    others = (key for key, part in value.items() if key != found[0] and is_real(part))
    return Score(reward, {key: number for key in others if (number := _part(key, value[key])) is not None})


def numbers_of(metrics: Any) -> dict[str, float]:
    """Return the metrics that a rollout came with, without those that are None.

    Raises ValueError, naming the key, for all else than a mapping of names to finite numbers, and for too many.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"returned metrics of type {type(metrics).__name__}; expected a mapping of numbers by name")
    if len(metrics) > MAX_PARTS:
        raise ValueError(f"returned {len(metrics)} metrics; at most {MAX_PARTS} can be time series")
    return {key: number for key, value in metrics.items() if (number := _part(key, value)) is not None}


def turn_rewards_of(rewards: Any, turns: int) -> dict[int, float]:
    """Return the rewards of single turns by their indices below ``turns``, without those that are None.

    JSON has the indices as text. Raises ValueError, naming the index, for all else than a mapping of indices to finite
    numbers.
    """
    if not isinstance(rewards, Mapping):
        raise ValueError(f"returned turn rewards of type {type(rewards).__name__}; expected a mapping by turn index")
    known, found = {str(turn): turn for turn in range(turns)}, {}
    for key, value in rewards.items():
        if (turn := known.get(str(key))) is None:
            raise ValueError(f"returned a reward for turn {key!r:.{MAX_NAME}}, but the rollout had {turns} turns")
        if (number := _part(str(key), value)) is not None:
            found[turn] = number
    return found


def weighted_sum(weights: Mapping[str, float], scores: Sequence[Score | None]) -> Score | None:
    """Return the sum of several rewards, of which each becomes a part, unweighted, with its own parts below its name.

    ``scores`` are in the order of ``weights``. One that is None drops out of the sum; None if all are.
    """
    total, parts = 0.0, dict[str, float]()
    for (name, weight), score in zip(weights.items(), scores, strict=True):
        if score is not None:
            total += weight * score.reward
            parts[name] = score.reward
            parts.update({f"{name}/{part}": value for part, value in score.parts.items()})
    return Score(total, parts) if parts else None


def shown_columns(prompt: Prompt) -> str:
    """Return a row's columns as messages name them."""
    return f"row {prompt.row} has {', '.join(map(str, prompt.fields)) or 'no fields'}"


def _part(key: Any, value: Any) -> float | None:
    """Return one number of a mapping. Raises ValueError, naming its key."""
    if not isinstance(key, str) or not key.isprintable() or not 0 < len(key) <= MAX_NAME:
        raise ValueError(
            f"returned a mapping with the key {key!r:.{MAX_NAME + 9}}; expected names of at most {MAX_NAME} characters"
        )
    try:
        return real_number(value)
    except ValueError as error:
        raise ValueError(f"{error}, under the key {key!r}") from None
