"""How far a rollout with an environment has come: what was said, what it was worth, and the environment's state.

Values that never change: each turn makes a new one, so that a checkpoint can have the latest at any moment. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.data.messages import Message
from async_rl.types import FinishReason


@dataclass(frozen=True, slots=True)
class Said:
    """A turn of the policy that has ended."""

    message: Message
    index: int
    """Its ``Reply.index``."""
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn of the policy, and what the environment answered it."""

    said: Said
    answer: tuple[Message, ...]
    reward: float | None
    """What the environment gave the turn; None for nothing."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A rollout at the end of a step, or with a step under way."""

    first: tuple[Message, ...] | None
    """The messages with which it began; None where the prompt is text without a template."""
    tools: tuple[dict[str, Any], ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False
    state: bytes | str | None = None
    """The environment's after the last of the exchanges, as ``instance.State``; None where it was not saved."""
    said: Said | None = None
    """The turn after these that the environment has not answered; a step for it may be under way."""

    @property
    def turns(self) -> int:
        """Turns of the policy that have ended."""
        return len(self.exchanges) + (self.said is not None)

    @property
    def turn_rewards(self) -> dict[int, float]:
        """The rewards of single turns, by their indices."""
        return {each.said.index: each.reward for each in self.exchanges if each.reward is not None}

    @property
    def conversation(self) -> list[Message]:
        """All messages so far, those of ``said`` included."""
        found = list(self.first or ())
        for exchange in self.exchanges:
            found += [exchange.said.message, *exchange.answer]
        return found if self.said is None else [*found, self.said.message]

    @property
    def unasked(self) -> Sequence[Message]:
        """The messages of the environment after the last turn that has ended."""
        return self.exchanges[-1].answer if self.exchanges else ()
