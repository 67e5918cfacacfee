"""What the policy sampled in a turn as the message that an agent gets: reasoning, calls of tools, and the rest.

Families of models write both in marks of their own, and the chat template of a checkpoint tells which: the parser of
calls is one that reads from what the template writes the very call that it was given, and the marks of reasoning are
those between which the template writes it. So there is no table of families, and no parser that almost fits.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import structlog

from async_rl.data.messages import Message
from async_rl.rollout.conversation import canonical
from async_rl.types import Int32Array

log = structlog.get_logger(__name__)

AUTO = "auto"

_T = TypeVar("_T")

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "zqlook",
        "description": "Look",
        "parameters": {"type": "object", "properties": {"zqword": {"type": "string"}}, "required": ["zqword"]},
    },
}
_CALL = {"id": "000000000", "type": "function", "function": {"name": "zqlook", "arguments": {"zqword": "zqvalue"}}}
_QUESTION: Message = {"role": "user", "content": "u"}
_CALLED: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_THOUGHT: Message = {"role": "assistant", "content": "zqanswer", "reasoning_content": "zqthought"}
# One word in brackets of some kind, which is how templates write their marks.
_MARK = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷)"


# Tokens of a context in whose text a mark that begins reasoning would be, where the template ends with it.
_MARK_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A turn of the policy that is complete."""

    text: str
    """What was sampled, without special tokens, up to a stop string."""
    token_ids: Int32Array
    """int32[n], without the stop token."""
    before: Int32Array
    """int32[m]: the context, of which the end says whether the turn began inside reasoning."""
    stop: Sequence[str]
    """Texts before which the message ends."""
    tools: list[dict[str, Any]] | None
    """Those that the request named; without any, nothing is a call."""


class Template(Protocol):
    """The chat template of a checkpoint."""

    def written(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, asks: bool) -> str:
        """Return messages as text, with the beginning of the policy's turn behind them if it ``asks`` for one.

        Raises RowFault where the template refuses them.
        """


class ToolParser(Protocol):
    """Reads turns in which tools are called; see ``engine.vllm.parsing``."""

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Sequence[Any]]:
        """Return what else a turn says, and its calls, each with ``name``, ``arguments`` as text and ``id``."""


class ToolParsers(NamedTuple):
    """The parsers that there are."""

    names: Sequence[str]
    """Those to try."""
    make: Callable[[str], ToolParser]
    """Makes the one of a name. Raises ValueError for a name that is unknown, or a tokenizer without its tokens."""


class Calls(NamedTuple):
    """How a checkpoint's calls are read."""

    name: str
    parser: ToolParser
    mark: str | None
    """What a call begins with; None where that is nothing that other text has not."""


class TurnReader:
    """Makes messages of turns. May be used by several threads; the first use takes seconds, others milliseconds."""

    def __init__(
        self,
        parsers: Callable[[], ToolParsers],
        decode: Callable[[Sequence[int]], str],
        tool_parser: str | None = AUTO,
    ) -> None:
        """Take ``parsers``, which is called when tools are named first, and ``decode`` with special tokens as text.

        tool_parser: AUTO for the one that the template tells, else a name, or None not to read calls.
        """
        self._parsers = parsers
        self._decode = decode
        self._named = tool_parser
        self._lock = threading.Lock()
        self._found: dict[str, Any] = {}
        self.read: Counter[bool] = Counter()
        """Calls that were read (True), and turns that began one which could not be (False)."""

    def message(self, turn: Sampled, template: Template) -> Message:
        """Return the message of a turn. Raises ValueError for a parser that there is not."""
        whole = before_any(self._decode(turn.token_ids.tolist()), turn.stop)
        thought = self.thought(template)
        reasoning, rest = None, whole
        if thought is not None:
            reasoning, rest = _parted(whole, self._decode(turn.before[-_MARK_TOKENS:].tolist()), thought)
        how = self.calls(template) if turn.tools else None
        content, calls = ("", ()) if how is None or not turn.tools else how.parser.read(rest, turn.tools)
        if not calls:
            # As it was sampled: parsers leave out what they cannot read.
            content = turn.text if reasoning is None else rest
        if how is not None:
            self.read[True] += len(calls)
            self.read[False] += not calls and how.mark is not None and how.mark in rest
        message: Message = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_call(call, at, len(turn.before)) for at, call in enumerate(calls)]
        return message

    def calls(self, template: Template) -> Calls | None:
        """Return how calls are read; None where they are not. Raises ValueError for a parser that there is not."""
        return None if self._named is None else self._once("calls", lambda: self._calls(template))

    def thought(self, template: Template) -> tuple[str, str] | None:
        """Return the marks before and behind reasoning; None where the template has none."""
        return self._once("thought", lambda: _thought(template))

    def _once(self, what: str, find: Callable[[], _T]) -> _T:
        with self._lock:
            if what not in self._found:
                self._found[what] = find()
            found: _T = self._found[what]
            return found

    def _calls(self, template: Template) -> Calls | None:
        names, make = self._parsers()
        written = _turn(template, _CALLED, [TOOL])
        opening = re.match(rf"\s*({_MARK})", (written or "").partition("zqlook")[0])
        mark = opening and opening[1]
        if self._named not in (AUTO, None):
            return Calls(self._named, make(self._named), mark)
        for name in names if written else ():
            with contextlib.suppress(ValueError):  # of another family, whose tokens are not there
                parser = make(name)
                if _reads(parser, written or ""):
                    log.info("tool_parser_found", tool_parser=name)
                    return Calls(name, parser, mark)
        log.warning("tool_calls_stay_text", hint="no parser reads them; name one: rollout.agent.tool_parser")
        return None


def before_any(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings in it."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


def _turn(template: Template, message: Message, tools: list[dict[str, Any]] | None) -> str | None:
    """Return what a template writes of a turn behind where the policy begins; None where it refuses the message."""
    try:
        asked = template.written([_QUESTION], tools, asks=True)
        whole = template.written([_QUESTION, message], tools, asks=False)
    except Exception:  # noqa: BLE001  a template may raise anything
        return None
    if whole.startswith(asked):
        return whole[len(asked) :]
    same = next(at for at, (one, other) in enumerate(zip(asked, whole, strict=False)) if one != other)
    return whole[max(whole.rfind(end, 0, same) + 1 for end in "\n>]▷") :]  # they may part within a mark


def _reads(parser: ToolParser, written: str) -> bool:
    """Return whether a parser reads the call that a template has written."""
    _, calls = parser.read(written, [TOOL])
    found = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return canonical(_CALLED | {"tool_calls": found}) == canonical(_CALLED)


def _thought(template: Template) -> tuple[str, str] | None:
    """Return the marks between which a template writes reasoning, or those of which it writes the first itself."""
    try:
        asked = template.written([_QUESTION], None, asks=True)
        whole = template.written([_QUESTION, _THOUGHT], None, asks=False)
    except Exception:  # noqa: BLE001  a template may raise anything
        return None
    if around := re.search(rf"({_MARK})\s*zqthought\s*({_MARK})\s*zqanswer", whole):
        return around[1], around[2]
    opened = re.search(r"(<[^<>\s]*think[^<>\s]*>)\s*$", asked)
    return (opened[1], f"</{opened[1][1:]}") if opened and not opened[1].startswith("</") else None


def _parted(whole: str, before: str, thought: tuple[str, str]) -> tuple[str | None, str]:
    """Return the reasoning of a turn and the rest; None for no reasoning. One that was cut off has no rest."""
    first, last = thought
    said = whole.lstrip()
    if said.startswith(first):
        said = said[len(first) :]
    elif not before.rstrip().endswith(first):
        return None, whole
    reasoning, _, rest = said.partition(last)
    return reasoning.strip(), rest.strip("\n")


def _call(call: Any, at: int, before: int) -> dict[str, Any]:
    """Return a call as OpenAI has it. Its id says where it stands, so that it is the same however often it is made."""
    return {
        # Of nine letters and digits, for Mistral's templates refuse any other.
        "id": call.id if call.id and call.id.startswith("functions.") else f"c{_base36(before, 5)}{_base36(at, 3)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _base36(number: int, digits: int) -> str:
    text = ""
    while number or len(text) < digits:
        number, digit = divmod(number, 36)
        text = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + text
    return text
