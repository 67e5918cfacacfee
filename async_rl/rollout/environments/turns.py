"""The environment of a multi-turn response, which answers each turn of the policy: a tool, a user, a game.

Token in, token out: the environment's text is tokenized once, alone, and appended to the tokens there are; messages
become what the chat template writes after a turn (``data.chat_turns``). What the policy sampled is never turned into
text and back, which can give other tokens than were sampled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from async_rl.config.functions import load_function
from async_rl.config.rollouts import EnvironmentSection
from async_rl.config.schema import RunConfig
from async_rl.data.chat_turns import ChatTurns
from async_rl.data.messages import Message
from async_rl.data.reading import chat_turns
from async_rl.errors import DatasetError, EnvironmentFailure, RowFault
from async_rl.rollout.environments.named import SETTING, environments_of
from async_rl.rollout.user_call import FunctionSpec
from async_rl.rollout.user_function import UserFunction, UserFunctionFailed
from async_rl.rollout.user_values import answer
from async_rl.types import Int32Array, Prompt

ARGUMENTS = ("prompt", "turns")


def load_environments(config: RunConfig, tokenizer: Any) -> dict[str, Environment]:
    """Return the environments of a run by their functions. Raises EnvironmentFailure, ModelError and DatasetError."""
    limits, named = config.rollout.environment, environments_of(config)
    chat = chat_turns(config) if named else None
    return {
        function: Environment(limits.model_copy(update={"function": function}), tokenizer, setting, chat)
        for function, setting in named.items()
    }


def load_environment(name: str, setting: str = SETTING) -> Callable[..., Any]:
    """Import the function that ``setting`` names as an environment. Raises EnvironmentFailure."""
    return load_function(setting, name, ARGUMENTS, EnvironmentFailure)


class Environment:
    """Calls the function that ``setting`` names for what follows a turn."""

    def __init__(
        self, settings: EnvironmentSection, tokenizer: Any, setting: str = SETTING, chat: ChatTurns | None = None
    ) -> None:
        """``chat`` renders the messages that it returns, and may be None for one that returns none."""
        assert settings.function is not None
        self._settings = settings
        self._setting = setting
        self._tokenizer = tokenizer
        self._chat = chat
        self._call = UserFunction(
            load_environment(settings.function, setting),
            FunctionSpec(setting, settings.function, ARGUMENTS, answer),
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
            said = await self._call(prompt, tuple(texts))
        except UserFunctionFailed as error:
            raise self._failure(prompt, str(error)) from error.__cause__
        if said is None:
            return None
        if isinstance(said, str):
            tokens = self._tokenizer.encode(said, add_special_tokens=False)
        else:
            tokens = await self._rendered(prompt, said, int(turns[-1][-1]))
        if not len(tokens):
            raise self._failure(prompt, f"returned {said!r}, which has no tokens; return None to end the response")
        return np.asarray(tokens, dtype=np.int32)

    async def _rendered(self, prompt: Prompt, messages: list[Message], last: int) -> list[int]:
        assert self._chat is not None
        try:
            # A template takes milliseconds.
            return await asyncio.to_thread(self._chat.tokens, messages, prompt.fields, last)
        except (RowFault, DatasetError) as fault:
            raise self._failure(prompt, f"returned messages, but {fault}") from None

    def _failure(self, prompt: Prompt, what: str) -> EnvironmentFailure:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return EnvironmentFailure(f"{self._setting} {self._settings.function}, {where}: {what}")
