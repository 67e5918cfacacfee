"""A branch of a session: what an agent and the policy have said one after the other, token by token.

A branch is a partial rollout and its turns. A fork begins a new one: its prompt is all that came before its own first
token, so that each sampled token is trained in one trajectory. Pure; knows ``partial`` and ``conversation``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from async_rl.data.messages import Message
from async_rl.rollout.conversation import Canonical, in_common
from async_rl.rollout.partial import PartialRollout
from async_rl.types import FinishReason, Int32Array, Trajectory

How = Literal["first", "root", "tools", "extended", "edited", "parallel", "cut", "stop_mismatch"]
"""How a turn came to its place.

first: it began the first branch. root, tools: a further one, because nothing comes before it that was said here, or
only with other tools. extended: behind the last turn of its branch. Else it forked one: the agent has edited what was
said, has asked twice at one time, or asks on behind a turn without its stop token, or with another than the template
writes.
"""


@dataclass(frozen=True, slots=True)
class SavedTurn:
    """What is saved of a turn, by the names of its fields."""

    how: How
    start: int
    stop: int
    messages: int | None
    index: int


@dataclass(slots=True, eq=False)
class Turn:
    """A turn of the policy that was asked for."""

    branch: Branch
    how: How
    asked: str | None
    """What the request had, messages or tokens, and what it said beside them; None where it cannot be repeated."""
    before: tuple[PartialRollout, tuple[Canonical, ...]] | None
    """Partial rollout and history of the branch before the request, until the turn has ended; None where the request
    made the branch."""
    start: int
    """Tokens of the branch before its own first one, prompt included."""
    stop: int = 0
    """Tokens of the branch up to its end, once it has ended."""
    messages: int | None = None
    """Messages of the branch's history up to the turn, once it has ended; None where the agent has sent tokens."""
    message: Message | None = None
    """What the policy said, as the agent gets it."""
    state: Literal["open", "ended", "failed"] = "open"
    index: int = -1
    """How many turns of the session ended before it, once it has ended."""
    _saved: SavedTurn | None = None

    def saved(self) -> SavedTurn:
        """Return what is saved of it; one that has ended does not change."""
        if self._saved is not None:
            return self._saved
        made = SavedTurn(self.how, self.start, self.stop, self.messages, self.index)
        self._saved = made if self.state == "ended" else None
        return made

    @property
    def token_ids(self) -> Int32Array:
        """int32[n]: what was sampled so far."""
        return self.branch.tokens[self.start : self.stop or None]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the branch ended, which is why its last turn did; None while that is sampled."""
        return self.branch.partial.finish_reason


@dataclass(slots=True, eq=False)
class Branch:
    """One branch; its session alone changes it."""

    partial: PartialRollout
    tools: str
    """The tools of its requests, as text that is equal for equal tools: with others the system's text differs."""
    root_tokens: int
    """Tokens of the prompt with which the conversation began, of which this branch may be a fork."""
    history: tuple[Canonical, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    """Those that have ended."""
    open: Turn | None = None
    """The one that is being sampled."""

    @property
    def tokens(self) -> Int32Array:
        """int32[P+G]: the branch so far."""
        return np.concatenate([self.partial.prompt_ids, self.partial.response_ids])

    def trajectory(self) -> Trajectory:
        """Return the branch as a trajectory, validated; its turns have ended. Raises InvalidTrajectory."""
        tools = json.loads(self.tools) if self.tools else []
        return self.partial.to_trajectory(origin=self.turns[0].how, tools=tuple(t["function"]["name"] for t in tools))

    def __len__(self) -> int:
        return len(self.partial.prompt_ids) + len(self.partial.response_ids)

    def matched(self, sent: Sequence[Canonical]) -> Turn | None:
        """Return its last turn up to which the messages ``sent`` are its history; None for no turn."""
        count = in_common(self.history, sent)
        return next((t for t in reversed(self.turns) if t.messages is not None and t.messages <= count), None)

    def matched_tokens(self, sent: Int32Array) -> Turn | None:
        """Return its last turn up to whose end the tokens ``sent`` are its own; None for no turn."""
        shorter = min(len(self), len(sent))
        differ = np.flatnonzero(self.tokens[:shorter] != sent[:shorter])
        count = int(differ[0]) if len(differ) else shorter
        return next((turn for turn in reversed(self.turns) if turn.stop <= count), None)

    def why_fork(self, turn: Turn) -> How | None:
        """Return why nothing can follow one of its turns in this branch; None where something can."""
        if turn is not self.turns[-1]:
            return "edited"
        if self.open is not None:
            return "parallel"
        return None if self.partial.finish_reason == "stop" else "cut"


def joined(before: Int32Array, tail: Int32Array, stop_token_ids: frozenset[int]) -> tuple[Int32Array, Int32Array]:
    """Return what is kept of the tokens up to the end of a turn, and what follows them.

    ``tail`` is what the template writes after a turn, its stop token first. If the policy has sampled that, it is not
    written again. If it has sampled another stop token, as models do that end a call of tools by one of its own, what
    follows must not stand behind both. A turn without any ends by the template's, which is context.
    """
    last = int(before[-1])
    if last == int(tail[0]):
        return before, tail[1:]
    return (before[:-1] if last in stop_token_ids else before), tail


def limited(partial: PartialRollout, tokens: int) -> PartialRollout:
    """Return the partial rollout with room for ``tokens`` more."""
    return replace(partial, max_response_tokens=len(partial.response_ids) + tokens)
