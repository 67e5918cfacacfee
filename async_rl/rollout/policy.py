"""The policy as an agent asks it, in this process: messages or tokens in, a turn out.

What the agent never sees stays behind it: a weight sync that cuts a turn, the calls that resume it, versions and routed
experts, and which branch of the session a request belongs to. Knows sessions; is given how an engine call is made and
how messages become tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from async_rl.data.messages import Message, checked_history, checked_tools
from async_rl.errors import DatasetError, RequestRefused, RowFault
from async_rl.rollout.branches import Turn
from async_rl.rollout.responses import Call
from async_rl.rollout.session import Place, Session
from async_rl.types import FinishReason, Int32Array


class Chat(Protocol):
    """How messages become tokens, as ``data.chat_turns.ChatTurns`` does it for one row."""

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the tokens of a whole conversation, up to where the policy's turn begins."""

    def after(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return those of messages that follow a turn of the policy, from its stop token on."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A turn of the policy, as an agent gets it."""

    message: Message
    """{"role": "assistant", "content": text}, to be sent back as it is."""
    text: str
    """What was sampled, without special tokens."""
    token_ids: Int32Array
    """int32[n]."""
    finish_reason: FinishReason
    index: int
    """How many turns of the rollout ended before it."""


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
    ) -> None:
        """Take the rollout's ``session`` and how an engine call is made for a partial rollout.

        chat: None where the checkpoint has no chat template. encode: text to tokens as it stands, without any added.
        decode: tokens to text, without special ones.
        """
        self._session = session
        self._call = call
        self._chat = chat
        self._encode = encode
        self._decode = decode
        self._ended: Turn | None = None  # last of all
        self._count = 0

    async def chat(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, *, max_tokens: int | None = None
    ) -> Reply:
        """Return the policy's answer to a conversation, which may contain what it said before.

        tools: JSON schemas of functions, as the chat template has them. max_tokens: the most that the turn may have.
        Raises RequestRefused, and has no effect then, for what cannot be answered or is beyond a limit.
        """
        try:
            messages, tools = checked_history(list(messages), "messages"), checked_tools(tools, "tools")
            turn = None
            while turn is None:  # Others may take the place while its tokens are made.
                place = self._session.find(messages, tools, {"max_tokens": max_tokens})
                turn = self._session.begin(place, await self._missing(place, tools), max_tokens)
        except (RowFault, DatasetError) as fault:
            raise RequestRefused("invalid_request", str(fault)) from None
        return await self._sampled(turn, with_message=True)

    async def complete(self, token_ids: Sequence[int] | Int32Array, *, max_tokens: int | None = None) -> Reply:
        """Return what the policy continues tokens with, which may begin with those of earlier turns.

        Raises RequestRefused as ``chat`` does.
        """
        sent = np.asarray(token_ids, dtype=np.int32)
        if sent.ndim != 1 or len(sent) == 0:
            raise RequestRefused("invalid_request", "there are no tokens to continue")
        place, missing = self._session.find_tokens(sent)
        return await self._sampled(self._begun(place, missing, max_tokens), with_message=False)

    async def extend(self, text: str, *, max_tokens: int | None = None) -> Reply:
        """Return what the policy says after ``text``, which is appended as it stands to the turn that ended last.

        Raises RequestRefused as ``chat`` does.
        """
        tokens = np.asarray(self._encode(text), dtype=np.int32)
        if self._ended is None or len(tokens) == 0:
            raise RequestRefused("invalid_request", "text needs tokens, and a turn of the policy before it")
        return await self._sampled(
            self._begun(self._session.find_after(self._ended), tokens, max_tokens), with_message=False
        )

    def _begun(self, place: Place, missing: Int32Array, max_tokens: int | None) -> Turn:
        turn = self._session.begin(place, missing, max_tokens)
        assert turn is not None, "nothing happens between finding a place and taking it"
        return turn

    async def _missing(self, place: Place, tools: list[dict[str, Any]] | None) -> Int32Array:
        if self._chat is None:
            raise RequestRefused("invalid_request", "the checkpoint has no chat template; use complete and extend")
        render = self._chat.prompt if place.after is None else self._chat.after
        # A template takes milliseconds.
        return np.asarray(await asyncio.to_thread(render, place.added, tools), dtype=np.int32)

    async def _sampled(self, turn: Turn, *, with_message: bool) -> Reply:
        """Complete a turn: as many engine calls as its interruptions take. One that fails is undone."""
        try:
            while not turn.branch.partial.finished:
                request = self._session.next_call(turn)
                partial = await self._call(turn.branch.partial, request)
                if turn.state != "open":
                    raise RequestRefused("rollout_budget_exceeded", "the rollout has ended")
                self._session.keep(turn, partial)
            text = self._decode(turn.token_ids)
            message = {"role": "assistant", "content": text}
            self._session.end(turn, message if with_message else None)
        except BaseException:
            self._session.undo(turn)
            raise
        self._ended = turn
        self._count += 1
        assert turn.finish_reason is not None
        return Reply(message, text, turn.token_ids, turn.finish_reason, self._count - 1)
