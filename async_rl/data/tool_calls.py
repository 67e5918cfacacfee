"""Arguments of tool calls as a chat template wants them: an object, or the JSON of one as text.

OpenAI's messages have text, most templates expect an object, and some join text. The wrong one is written as a quoted
string, or as Python writes a dictionary, which the model has never seen. Pure; how messages are rendered is passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from async_rl.data.messages import Message

_KEY = "zq"  # in no template by itself
_CALL = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {_KEY: "v"}}}
PROBE: list[Message] = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]
"""A conversation with a call whose arguments are an object. Its id is of a form that all templates take."""


def wants_text(render: Callable[[list[Message]], str]) -> bool:
    """Return whether a template wants arguments as text; ``render`` may raise whatever a template does.

    It does if it cannot write an object as JSON or in marks of its own, but can write text.
    """
    return not _writes(render, PROBE) and _writes(render, with_arguments(PROBE, as_text=True))


def with_arguments(messages: Sequence[Message], *, as_text: bool) -> list[Message]:
    """Return messages with the arguments of their tool calls as text, or as objects; what is no JSON stays text."""
    return [
        message | {"tool_calls": [_call(call, as_text=as_text) for call in calls]}
        if (calls := message.get("tool_calls"))
        else message
        for message in messages
    ]


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call | _converted(call, as_text=as_text)
    return call | {"function": function | _converted(function, as_text=as_text)}


def _converted(function: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, dict):
        return {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if as_text or not isinstance(arguments, str):
        return {}
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return {"arguments": found} if isinstance(found, dict) else {}


def _writes(render: Callable[[list[Message]], str], messages: list[Message]) -> bool:
    try:
        text = render(messages)
    except Exception:  # noqa: BLE001  a template may raise anything
        return False
    return _KEY in text and f"'{_KEY}'" not in text
