"""Finds the functions that settings name as rewards, in whichever form they are written.

It runs nothing but the import of a function's module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from async_rl.config.functions import import_function
from async_rl.errors import RewardError
from async_rl.rollout.rewards import adapters
from async_rl.rollout.rewards.named import NamedReward
from async_rl.rollout.rewards.score import FinishedResponse, score_of
from async_rl.rollout.rewards.signature import Signature
from async_rl.rollout.user_call import FunctionSpec, is_async
from async_rl.types import Prompt


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward that was found."""

    call: Callable[..., Any]
    """Called with a prompt and a FinishedResponse, or a tuple of them; async if the function is."""
    named: frozenset[str]
    """What its signature names; other parts of a response need not be prepared for it."""
    whole_groups: bool = False
    """Whether it is called with all responses of a group."""


def load_reward(named: NamedReward) -> Reward:
    """Import a reward and find out what it is to be called with.

    Raises RewardError, naming the setting and the fix, when it cannot be found or called.
    """
    function = import_function(named.setting, named.function.removeprefix(f"{named.form}:"), RewardError)
    try:
        if named.form == "trl":
            reward = Reward(adapters.trl(function, named.arguments), frozenset({"completion_ids"}), whole_groups=True)
        elif named.form == "verl":
            reward = Reward(adapters.verl(function, named.arguments), frozenset())
        else:
            reward = _by_signature(function, named.arguments)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise RewardError(f"{named.setting}: {named.function!r} cannot be called as {error}") from None
    return Reward(_as_async_as(function, reward.call), reward.named, reward.whole_groups)


@dataclass(frozen=True, slots=True)
class RewardSpec(FunctionSpec):
    """A reward for worker processes; see ``load_reward``."""

    reward: NamedReward

    @classmethod
    def of(cls, named: NamedReward) -> RewardSpec:
        """Return the spec of a reward."""
        convert = adapters.scores_of if named.form == "trl" else score_of
        return cls(named.setting, named.function, (), convert, named)

    @override
    def load(self) -> Callable[..., Any]:
        """Import the function, to be called as ``Reward.call`` says. Raises RewardError."""
        return load_reward(self.reward).call


def _by_signature(function: Callable[..., Any], given: Mapping[str, Any]) -> Reward:
    signature = Signature.of(function)
    if unknown := given.keys() - signature.named:
        raise TypeError(f"f(..., {sorted(unknown)[0]}=...), which its settings ask for")

    def call(prompt: Prompt, response: FinishedResponse) -> Any:
        positional, named = signature.arguments(prompt, response, given)
        return function(*positional, **named)

    return Reward(call, signature.named)


def _as_async_as(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, async if ``function`` is, and with its attributes: ``limits_own_time`` sets one."""
    result = call
    if is_async(function):

        async def awaits(*arguments: Any) -> Any:
            return await call(*arguments)

        result = awaits
    result.__dict__.update(getattr(function, "__dict__", {}))
    return result
