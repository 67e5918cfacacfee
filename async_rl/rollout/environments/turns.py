"""The environment of a multi-turn response, which answers each turn of the policy: a tool, a user, a game.

Token in, token out: the environment's text is tokenized once, alone, and appended to the tokens there are. What the
policy sampled is never turned into text and back, which can give other tokens than were sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from async_rl.config.functions import load_function
from async_rl.config.rollouts import EnvironmentSection
from async_rl.config.schema import RunConfig
from async_rl.errors import EnvironmentFailure
from async_rl.rollout.environments.named import SETTING, environments_of
from async_rl.rollout.user_call import FunctionSpec
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.rollout.user_values import text_or_none
from async_rl.types import Int32Array, Prompt

ARGUMENTS = ("prompt", "turns")


def load_environments(config: RunConfig, tokenizer: Any) -> dict[str, Environment]:
    """Return the environments of a run by their functions. Raises EnvironmentFailure."""
    limits = config.rollout.environment
    return {
        function: Environment(limits.model_copy(update={"function": function}), tokenizer, setting)
        for function, setting in environments_of(config).items()
    }


def load_environment(name: str, setting: str = SETTING) -> Callable[..., Any]:
    """Import the function that ``setting`` names as an environment. Raises EnvironmentFailure."""
    return load_function(setting, name, ARGUMENTS, EnvironmentFailure)


class Environment:
    """Calls the function that ``setting`` names for what follows a turn."""

    def __init__(self, settings: EnvironmentSection, tokenizer: Any, setting: str = SETTING) -> None:
        assert settings.function is not None
        self._settings = settings
        self._setting = setting
        self._tokenizer = tokenizer
        self._call = UserFunction(
            load_environment(settings.function, setting),
            FunctionSpec(setting, settings.function, ARGUMENTS, text_or_none),
            "rollout.environment",
            slow=settings.slow,
            timeout_s=settings.timeout_s,
            workers=settings.workers,
            retries=settings.retries,
        )

    @property
    def killed(self) -> int:
        """Calls so far that were killed at rollout.environment.timeout_s."""
        return self._call.killed

    def close(self) -> None:
        """Refuse further calls and end those under way."""
        self._call.close()

    async def answer(self, prompt: Prompt, turns: tuple[Int32Array, ...], texts: list[str]) -> Int32Array | None:
        """Return the tokens of the next turn, or None if the response ends.

        ``turns`` is the response so far, in alternation: the policy's turn, the environment's, ..., the policy's.
        ``texts`` are those that earlier calls for this response have decoded, and gets the new ones: decoding all at
        each turn would take time that grows with the square of their number.
        Raises EnvironmentFailure naming the function, the row and what it did.
        """
        texts += (self._tokenizer.decode(turn, skip_special_tokens=True) for turn in turns[len(texts) :])
        try:
            text = await self._call(prompt, tuple(texts))
        except UserFunctionFailed as error:
            raise self._failure(prompt, str(error)) from error.__cause__
        if text is None:
            return None
        tokens = np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        if not len(tokens):
            raise self._failure(prompt, f"returned {text!r}, which has no tokens; return None to end the response")
        return tokens

    def _failure(self, prompt: Prompt, what: str) -> EnvironmentFailure:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return EnvironmentFailure(f"{self._setting} {self._settings.function}, {where}: {what}")
