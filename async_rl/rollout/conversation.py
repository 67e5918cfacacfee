"""What of a message counts when an agent sends its history back: whether the policy said just that.

Agents' libraries add keys, drop what they do not know, and write arguments of tools as they like. Compared is what a
template or a person would read differently. Pure: plain data in, plain data out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_rl.data.messages import Message


@dataclass(frozen=True, slots=True)
class Canonical:
    """A message in the one form in which it is compared."""

    role: str
    content: str
    tool_calls: tuple[tuple[str, str], ...] = ()
    """(name, arguments) of each; the arguments as JSON in one spelling."""
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None

    def is_again(self, sent: Canonical) -> bool:
        """Return whether ``sent`` is this message, sent back. Most agents leave the reasoning out."""
        return self._said == sent._said and sent.reasoning in (None, self.reasoning)

    @property
    def _said(self) -> tuple[Any, ...]:
        return self.role, self.content, self.tool_calls, self.tool_call_id, self.name


def canonical(message: Message) -> Canonical:
    """Return a message as it is compared.

    Content that is absent equals an empty one, and a list of texts equals their concatenation. White space at both ends
    of the assistant's counts as nothing, for parsers leave some there. The ids of its tool calls count as nothing too.
    """
    role = str(message.get("role"))
    said = role == "assistant"
    content = _text(message.get("content"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") if said else None
    calls = message.get("tool_calls") or () if said else ()
    return Canonical(
        role=role,
        content=content.strip() if said else content,
        tool_calls=tuple(map(_call, calls)),
        tool_call_id=message.get("tool_call_id") if role == "tool" else None,
        name=None if said else message.get("name"),
        reasoning=str(reasoning).strip() or None if reasoning else None,
    )


def in_common(history: Sequence[Canonical], sent: Sequence[Canonical]) -> int:
    """Return how many messages ``history`` and the messages ``sent`` after it have in common from the first on."""
    count = 0
    for one, other in zip(history, sent, strict=False):
        if not one.is_again(other):
            break
        count += 1
    return count


def as_key(value: Any) -> str:
    """Return plain data as text that is equal for equal data."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _text(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def _call(call: Any) -> tuple[str, str]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return str(function.get("name")), arguments
    return str(function.get("name")), as_key(arguments or {})
