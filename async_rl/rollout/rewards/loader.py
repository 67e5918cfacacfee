"""Finds the function that a setting names as a reward, in whichever form it is written.

It runs nothing but the import of the function's module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from async_rl.config.functions import import_function
from async_rl.errors import RewardError
from async_rl.rollout.rewards.score import FinishedResponse, score_of
from async_rl.rollout.rewards.signature import Signature
from async_rl.rollout.user_call import FunctionSpec, is_async
from async_rl.types import Prompt


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward that was found: ``call(prompt, response: FinishedResponse)``, which is async if the function is."""

    call: Callable[..., Any]
    named: frozenset[str]
    """What its signature names; other parts of a response need not be prepared for it."""


def load_reward(name: str, setting: str = "reward.function") -> Reward:
    """Import the reward ``module:function`` and find out what it is to be called with, by its signature.

    Raises RewardError, naming the setting and the fix, when it cannot be found or called so.
    """
    function = import_function(setting, name, RewardError)
    try:
        signature = Signature.of(function)
    except TypeError as error:
        raise RewardError(f"{setting}: {name!r} cannot be called as {error}") from None

    def call(prompt: Prompt, response: FinishedResponse) -> Any:
        positional, named = signature.arguments(prompt, response)
        return function(*positional, **named)

    return Reward(as_async_as(function, call), signature.named)


@dataclass(frozen=True, slots=True)
class RewardSpec(FunctionSpec):
    """A reward by name; see ``load_reward``."""

    @classmethod
    def of(cls, name: str, setting: str) -> RewardSpec:
        """Return the spec of the reward that ``setting`` names."""
        return cls(setting, name, (), score_of)

    @override
    def load(self) -> Callable[..., Any]:
        """Import the function, to be called with a prompt and a finished response. Raises RewardError."""
        return load_reward(self.name, self.setting).call


def as_async_as(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, async if ``function`` is, and with its attributes: ``limits_own_time`` sets one."""
    result = call
    if is_async(function):

        async def awaits(*arguments: Any) -> Any:
            return await call(*arguments)

        result = awaits
    result.__dict__.update(getattr(function, "__dict__", {}))
    return result
