"""vLLM's parsers of tool calls, each for the way in which some family of models writes them.

They work without an engine, so whichever samples the turn. vLLM moves these modules between releases; this file alone
knows where they are (as of 0.30: vllm/parser/parser_manager.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.tool_parsers import ToolParserManager

TOOL_PARSERS = (
    *("hermes", "qwen3_xml", "glm45", "mistral", "deepseek_v3", "deepseek_v31", "kimi_k2", "minimax_m2", "seed_oss"),
    *("granite", "phi4_mini_json", "olmo3", "pythonic", "llama3_json"),
)
"""Names to try, those first that read nothing but their own marks; llama3_json takes any object for a call."""

_LOGGERS = ("vllm.parser", "vllm.tool_parsers")


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: str
    """What the policy wrote, JSON as text where it could be read."""
    id: str | None


class ToolParser:
    """Reads turns in which tools are called."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Raise ValueError for a name that vLLM does not know, or whose tokens the tokenizer lacks."""
        known = ToolParserManager.list_registered()
        if name not in known:
            raise ValueError(f"vLLM has no tool parser {name!r}; it has {', '.join(known)}")
        self._tokenizer = tokenizer
        self._parser = ParserManager.get_parser(name, None, enable_auto_tools=True)
        assert self._parser is not None
        try:
            self._parser(tokenizer)
        except Exception as error:  # noqa: BLE001  each parser has its own
            raise ValueError(f"vLLM's tool parser {name!r} does not fit the tokenizer: {error}") from None
        for logger in _LOGGERS:  # else a traceback for each call that a policy misspells
            logging.getLogger(logger).setLevel(logging.CRITICAL)

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[Call, ...]]:
        """Return what else a whole turn says, and its calls. ``tools`` are those that the request named."""
        request = ChatCompletionRequest.model_validate(
            {"messages": [{"role": "user", "content": ""}], "tools": list(tools), "tool_choice": "auto"}
        )
        parser = self._parser(self._tokenizer, request.tools)  # keeps state of what it has read
        try:
            _, content, calls = parser.parse(text, request, enable_auto_tools=True)
        except Exception:  # noqa: BLE001  some raise at what a policy may write
            return text, ()
        return content or "", tuple(Call(call.name, call.arguments, call.id) for call in calls or ())
