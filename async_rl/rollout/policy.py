"""The policy as an agent asks it, in this process: messages or tokens in, a turn out.

What the agent never sees stays behind it: a weight sync that cuts a turn, the calls that resume it, versions and routed
experts, and which branch of the session a request belongs to. Knows sessions; is given how an engine call is made and
how messages become tokens.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol

import numpy as np

from async_rl.data.messages import Message, checked_history, checked_tools
from async_rl.errors import DatasetError, RefusalCode, RequestRefused, RowFault
from async_rl.rollout.aside import in_turn
from async_rl.rollout.branches import Turn
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.session import Place, Session
from async_rl.rollout.turn_message import Sampled, before_any
from async_rl.types import FinishReason, Float32Array, Int32Array

Call = Callable[[PartialRollout, str, Sequence[str]], Awaitable[PartialRollout]]
"""(partial rollout, request id, further stop strings) -> the partial rollout after one more engine call."""

_Request = ParamSpec("_Request")


class Chat(Protocol):
    """How messages become tokens, as ``data.chat_turns.ChatTurns`` does it for one row."""

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the tokens of a whole conversation, up to where the policy's turn begins."""

    def after(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return those of messages that follow a turn of the policy, from its stop token on."""


class Reader(Protocol):
    """How a turn becomes a message, as ``TurnReader`` does it for one row. Is called in threads."""

    def message(self, turn: Sampled) -> Message:
        """Return the message of a turn; see ``TurnReader.message``."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A turn of the policy, as an agent gets it."""

    message: Message
    """{"role": "assistant", "content": text}, with "tool_calls" and "reasoning_content" where the policy wrote such; to
    be sent back as it is."""
    text: str
    """What was sampled, without special tokens."""
    token_ids: Int32Array
    """int32[n]."""
    finish_reason: FinishReason
    index: int
    """How many turns of the rollout ended before it."""
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))
    """float32[n], as they were recorded."""
    context_tokens: int = 0
    """How many tokens came before it."""


class Address(NamedTuple):
    """Where programs reach a rollout's policy over HTTP, as clients of OpenAI's API take it."""

    base_url: str
    api_key: str
    model: str


_Ask = Callable[Concatenate["Policy", _Request], Coroutine[Any, Any, Reply]]


def _counted(ask: _Ask[_Request]) -> _Ask[_Request]:
    """Count the requests that a method refuses."""

    @functools.wraps(ask)
    async def counting(policy: Policy, /, *args: _Request.args, **kwargs: _Request.kwargs) -> Reply:
        try:
            return await ask(policy, *args, **kwargs)
        except RequestRefused as refused:
            policy.refused[refused.code] += 1
            raise

    return counting


class Policy:
    """Samples the turns of one rollout. Requests may be made at one time."""

    def __init__(
        self,
        session: Session,
        call: Call,
        *,
        chat: Chat | None,
        encode: Callable[[str], list[int]],
        decode: Callable[[Int32Array], str],
        reader: Reader | None = None,
        serve: Callable[[Policy], Address] | None = None,
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the rollout's ``session`` and how an engine call is made for a partial rollout.

        chat: None where the checkpoint has no chat template. encode: text to tokens as it stands, without any added.
        decode: tokens to text, without special ones. reader: makes messages of turns; without it they are text alone,
        as they are where no messages are sent. serve: makes a policy reachable over HTTP. kept: is called when
        a turn has begun, and when the session has the tokens of an engine call.
        """
        self._session = session
        self._call = call
        self._chat = chat
        self._encode = encode
        self._decode = decode
        self._reader = reader
        self._serve = serve
        self._kept = kept
        self._address: Address | None = None
        self.refused: Counter[RefusalCode] = Counter()
        """Requests that were refused, by why."""
        self._replies: dict[Turn, Reply] = {}

    @property
    def base_url(self) -> str:
        """Where clients of OpenAI's API reach this policy; the gateway is started for the first that asks."""
        return self._reachable().base_url

    @property
    def api_key(self) -> str:
        """The key of this rollout, without which the gateway refuses every request."""
        return self._reachable().api_key

    @property
    def model(self) -> str:
        """The model's name at the gateway, which answers to any."""
        return self._reachable().model

    @property
    def is_served(self) -> bool:
        """Whether it is reachable over HTTP, which it is from the first look at an address on."""
        return self._address is not None

    def _reachable(self) -> Address:
        if self._address is None:
            assert self._serve is not None, "this policy is not served"
            self._address = self._serve(self)
        return self._address

    @_counted
    async def chat(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """Return the policy's answer to a conversation, which may contain what it said before.

        tools: JSON schemas of functions, as the chat template has them. max_tokens: the most that the turn may have.
        stop: texts that end the turn beside those of the settings, and are not part of the message. Raises
        RequestRefused, and has no effect then, for what cannot be answered or is beyond a limit.
        """
        try:
            messages, tools = checked_history(list(messages), "messages"), checked_tools(tools, "tools")
            turn = None
            while turn is None:  # Others may take the place while its tokens are made.
                place = self._session.find(messages, tools, _more(max_tokens, stop))
                turn = self._session.begin(place, await self._missing(place, tools), max_tokens)
        except (RowFault, DatasetError) as fault:
            raise RequestRefused("invalid_request", str(fault)) from None
        return await self._sampled(turn, stop, with_message=True, tools=tools)

    def repeated(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply | None:
        """Return the answer that ``chat`` has given to the same request, if nothing followed it; see ``Session``."""
        turn = self._session.repeated(messages, tools, _more(max_tokens, stop))
        return None if turn is None else self._replies.get(turn)

    async def tokenize(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the tokens of a whole conversation, as ``chat`` begins one with it. Raises RequestRefused."""
        try:
            return [int(token) for token in await self._rendered(None, messages, tools)]
        except (RowFault, DatasetError) as fault:
            raise RequestRefused("invalid_request", str(fault)) from None

    @_counted
    async def complete(
        self, token_ids: Sequence[int] | Int32Array, *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Reply:
        """Return what the policy continues tokens with, which may begin with those of earlier turns.

        ``max_tokens`` and ``stop`` are as in ``chat``. Raises RequestRefused as ``chat`` does.
        """
        sent = np.asarray(token_ids, dtype=np.int32)
        if sent.ndim != 1 or len(sent) == 0:
            raise RequestRefused("invalid_request", "there are no tokens to continue")
        place, missing = self._session.find_tokens(sent, _more(max_tokens, stop))
        return await self._sampled(self._begun(place, missing, max_tokens), stop, with_message=False)

    def completed(
        self, token_ids: Sequence[int] | Int32Array, *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Reply | None:
        """Return the answer that ``complete`` has given to the same request, if nothing followed it."""
        sent = np.asarray(token_ids, dtype=np.int32)
        turn = self._session.repeated_tokens(sent, _more(max_tokens, stop))
        return None if turn is None else self._replies.get(turn)

    @_counted
    async def extend(self, text: str, *, max_tokens: int | None = None) -> Reply:
        """Return what the policy says after ``text``, which is appended as it stands to the turn that ended last.

        Raises RequestRefused as ``chat`` does.
        """
        tokens = np.asarray(self._encode(text), dtype=np.int32)
        last = self._session.last
        if last is None or len(tokens) == 0:
            raise RequestRefused("invalid_request", "text needs tokens, and a turn of the policy before it")
        return await self._sampled(
            self._begun(self._session.find_after(last), tokens, max_tokens), (), with_message=False
        )

    @property
    def cut_off(self) -> bool:
        """Whether a turn was being sampled when the session was saved of which this one is the rest."""
        return self._session.under_way is not None

    async def resume(self, tools: list[dict[str, Any]] | None = None) -> Reply:
        """Return the turn that was ``cut_off``, completed; ``tools`` are those of the request that began it."""
        turn = self._session.under_way
        assert turn is not None, "no turn was cut off"
        return await self._sampled(turn, (), with_message=bool(turn.branch.history), tools=tools)

    def restart(self) -> None:
        """Forget all that was said."""
        self._session.restart()
        self._replies.clear()

    def _begun(self, place: Place, missing: Int32Array, max_tokens: int | None) -> Turn:
        turn = self._session.begin(place, missing, max_tokens)
        assert turn is not None, "nothing happens between finding a place and taking it"
        return turn

    async def _missing(self, place: Place, tools: list[dict[str, Any]] | None) -> Int32Array:
        return await self._rendered(place.after, place.added, tools)

    async def _rendered(
        self, after: Turn | None, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> Int32Array:
        if self._chat is None:
            raise RequestRefused("invalid_request", "the checkpoint has no chat template; use complete and extend")
        render = self._chat.prompt if after is None else self._chat.after
        return np.asarray(await in_turn(lambda: render(messages, tools)), dtype=np.int32)

    async def _sampled(
        self, turn: Turn, stop: Sequence[str], *, with_message: bool, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """Complete a turn: as many engine calls as its interruptions take. One that fails is undone."""
        try:
            self._kept()
            while not turn.branch.partial.finished:
                request = self._session.next_call(turn)
                partial = await self._call(turn.branch.partial, request, stop)
                self._still_open(turn)
                self._session.keep(turn, partial)
                self._kept()
            text = self._decode(turn.token_ids)
            message = {"role": "assistant", "content": before_any(text, stop)}
            if with_message and self._reader is not None:
                message = await in_turn(
                    functools.partial(self._read, self._reader, turn, message["content"], stop, tools)
                )
                self._still_open(turn)
            self._session.end(turn, message if with_message else None)
        except BaseException:
            self._session.undo(turn)
            raise
        assert turn.finish_reason is not None
        partial = turn.branch.partial
        # Copies: a view would keep the whole branch as it was at each of its turns.
        logprobs = partial.logprobs[turn.start - len(partial.prompt_ids) :].copy()
        sampled = turn.token_ids.copy()
        reply = Reply(message, text, sampled, turn.finish_reason, turn.index, logprobs, turn.start)
        self._replies[turn] = reply
        return reply

    def _read(
        self, reader: Reader, turn: Turn, text: str, stop: Sequence[str], tools: list[dict[str, Any]] | None
    ) -> Message:
        """Return the message of a turn that is complete, whose ``text`` ends before a stop string."""
        whole, partial = turn.branch.tokens, turn.branch.partial
        before, tokens = whole[: turn.start], whole[turn.start :]
        if len(tokens) and int(tokens[-1]) in partial.stop_token_ids:
            tokens = tokens[:-1]
        return reader.message(Sampled(text, tokens, before, stop, tools))

    @staticmethod
    def _still_open(turn: Turn) -> None:
        if turn.state != "open":
            raise RequestRefused("rollout_budget_exceeded", "the rollout has ended")


def _more(max_tokens: int | None, stop: Sequence[str]) -> dict[str, Any]:
    """Return what tells a request from another one of the same messages."""
    return {"max_tokens": max_tokens, "stop": list(stop)}
