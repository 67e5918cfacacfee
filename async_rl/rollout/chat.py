"""How an agent's messages become tokens, and turns of the policy messages, with the checkpoint's chat template.

What that takes is loaded when the first agent needs it: the template for messages, vLLM's parsers for tools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.data.chat_turns import ChatTurns, RowChat
from async_rl.data.messages import Message
from async_rl.data.reading import chat_turns
from async_rl.rollout.turn_message import Sampled, ToolParsers, TurnReader


def shared_turns(config: RunConfig) -> Callable[[], ChatTurns]:
    """Return what returns the chat of a run, which is loaded with the first call."""
    return functools.cache(lambda: chat_turns(config))


class Chat:
    """The chat of one agent in one worker."""

    def __init__(self, turns: Callable[[], ChatTurns], tokenizer: Any, tool_parser: str | None, setting: str) -> None:
        """Load nothing yet. ``turns`` returns what renders messages, and ``setting`` is that of ``tool_parser``."""
        self._turns = turns
        self.reader = TurnReader(
            lambda: _tool_parsers(tokenizer, setting),
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
            tool_parser,
        )

    def for_row(self, fields: Mapping[str, Any]) -> _RowChat:
        """Return the chat for a row, whose fields may have variables of the template."""
        return _RowChat(lambda: self._turns().for_row(fields), self.reader)


class _RowChat:
    """The ``Chat`` and the ``Reader`` of a policy."""

    def __init__(self, row: Callable[[], RowChat], reader: TurnReader) -> None:
        self._row, self._reader = row, reader

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return self._row().prompt(messages, tools)

    def after(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return self._row().after(messages, tools)

    def message(self, turn: Sampled) -> Message:
        return self._reader.message(turn, self._row())


def _tool_parsers(tokenizer: Any, setting: str) -> ToolParsers:
    from async_rl.rollout.engine.vllm.parsing import TOOL_PARSERS, ToolParser

    def make(name: str) -> ToolParser:
        try:
            return ToolParser(name, tokenizer)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None

    return ToolParsers(TOOL_PARSERS, make)
