"""What an environment with state is written with. Imports the standard library alone, so that any interpreter can.

A class has ``setup``, ``step``, ``reward`` and ``close``, all plain or async, of which the first three may be left out:
see docs/how-to/write-an-environment.md. Without ``step``, its public methods that have docstrings are tools. With
``rollout`` it makes the whole rollout itself, and asks the policy over HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """The dataset row of a rollout."""

    prompt_id: str
    """The id "<epoch>-<row>", with the name of its source before it if it has one."""
    row: int
    """Number of the row in its dataset, from 1."""
    text: str
    """The prompt as text; of messages, what the chat template made of them."""
    messages: list[Message] | None
    """The prompt as messages; None where it is text that no template is applied to."""
    fields: dict[str, Any]
    """The row's fields, as a reward gets them."""
    seed: int
    """A number below 2**32 that all rollouts of the prompt have in common, so that a group plays one game."""


@dataclass(frozen=True)
class Context:
    """What an environment may know of its rollout beside the row."""

    rollout_id: str
    """The id "<group_id>/<index>", different for each attempt at a prompt."""
    seed: int
    """A number below 2**32 that is the same whenever this rollout is made again."""


@dataclass(frozen=True)
class PolicyAddress:
    """Where ``rollout`` reaches the policy, as clients of OpenAI's API take it."""

    base_url: str
    api_key: str
    model: str


@dataclass
class Step:
    """What ``step`` returns, ``rollout`` of all of it, or a tool that says more than a text."""

    messages: str | Sequence[Message] = ()
    """What the policy sees next; text alone is one message, of the user or of the tool."""
    reward: float | None = None
    """What the step is worth. The sum of all is the rollout's reward, unless ``reward`` returns one."""
    done: bool = False
    """Whether the rollout ends here."""
    truncated: bool = False
    """Whether it ends here because a limit of the environment was reached."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers by name; the last of each is a part of the reward, which does not change for it."""


class ToolError(Exception):
    """Raised by a tool for what the policy did wrong: it gets the message as the tool's answer, and goes on."""
