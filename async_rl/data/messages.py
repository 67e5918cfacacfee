"""What a row's messages and tools must be before a chat template sees them.

Templates check little themselves: most leave out what they do not know without a word, and the policy would be asked
something else than the row says. Pure: plain data in, plain data out; it knows ``errors``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from async_rl.errors import RowFault

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have. Some templates join a role into a control token, so it must be one of these."""

_TEXT_PARTS = ("text", "input_text")


def checked_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a row, each with its content as one string; ``where`` names their field.

    Keys without a value are left out: so does a table, whose rows all have the same keys, write a missing one. Raises
    RowFault for what a template would misread, naming the message.
    """
    messages = _messages(value, where)
    if messages[-1]["role"] == "assistant":
        raise RowFault(
            f"{where}, message {len(messages)}: the last message is the assistant's, which the policy is to write; "
            "remove it from the prompt"
        )
    if all(message["role"] in ("system", "developer") for message in messages):
        raise RowFault(f"{where} has no message of a user; it has only {messages[0]['role']} messages")
    return messages


def checked_answer(value: Any, where: str) -> list[Message]:
    """Return messages that follow a turn of the policy, as ``checked_messages`` does. Raises RowFault."""
    messages = _messages(value, where)
    if said := next((at for at, message in enumerate(messages, 1) if message["role"] == "assistant"), None):
        raise RowFault(f"{where}, message {said}: it is the assistant's, which the policy is to write")
    return messages


def checked_history(value: Any, where: str) -> list[Message]:
    """Return the messages that an agent sends, as ``checked_messages`` does, but any may be empty. Raises RowFault."""
    return _messages(value, where, may_be_empty=True)


def with_system(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Return the messages, after a system message of ``system_prompt`` unless they begin with one of their own."""
    if system_prompt is None or messages[0]["role"] in ("system", "developer"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def checked_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of tools, which may be JSON as text; None for none.

    Raises RowFault for anything that is no list of {"type": "function", "function": {"name": ..., ...}}.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"{where} is not JSON ({error})") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowFault(f"{where} is {type(value).__name__}, not a list of tools")
    tools = [_without_nulls(tool) for tool in value]
    for at, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise RowFault(
                f'{where}, tool {at}: no name of a function; a tool is {{"type": "function", "function": '
                '{"name": ..., "parameters": ...}}'
            )
        for key, kind in (("description", str), ("parameters", dict)):
            if not isinstance(function.get(key, kind()), kind):
                raise RowFault(f"{where}, tool {at}: {key} is {type(function[key]).__name__}, not {kind.__name__}")
    return tools


def _messages(value: Any, where: str, *, may_be_empty: bool = False) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault(f"{where} is {type(value).__name__}, not a list of messages")
    if not value:
        raise RowFault(f"{where} has no messages")
    return [
        _message(_without_nulls(message), f"{where}, message {at}", may_be_empty=may_be_empty)
        for at, message in enumerate(value, 1)
    ]


def _message(message: Any, where: str, *, may_be_empty: bool) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"{where} is {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise RowFault(f"{where}: the role is {str(role)[:40]!r}; it must be one of {known}")
    content = _text(message.get("content"), where)
    if not _is_utf8(content):
        raise RowFault(f"{where} has half of a surrogate pair, which is not a character")
    if not (may_be_empty or content.strip() or (role == "assistant" and message.get("tool_calls"))):
        raise RowFault(f"{where}: the content of the {role} is empty")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowFault(f"{where}: tool_calls is {str(calls)[:40]!r}, not a list of objects")
    return message | {"content": content}


def _text(content: Any, where: str) -> str:
    """Return a message's content, given as text or as a list of parts that are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFault(f"{where}: the content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowFault(f"{where}: the content has a part of type {str(kind)[:40]!r}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
