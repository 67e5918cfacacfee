"""What an agent is called with beside prompt and policy, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from async_rl.types import RolloutEnd


@dataclass(frozen=True, slots=True)
class Context:
    """What an agent may know of its rollout beside the prompt."""

    rollout_id: str
    """The id "<group_id>/<index>", different for each attempt at a prompt."""
    seed: int
    """A number below 2**32 that is the same whenever this rollout is made again."""
    evaluation: str | None = None
    """The evaluation set that the prompt is of; None in training."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an agent returns. A number or a mapping alone stands for one with this reward."""

    reward: float | Mapping[str, Any] | None
    """A finite number, or a mapping with ``reward`` or ``score``, whose other numbers are parts of it; None for a
    rollout that has no reward and is left out of its group."""
    end: RolloutEnd | None = None
    """How it ended; None for truncated if a request was refused at a limit or the last turn was cut off, else done."""
    trainable: bool = True
    """Whether the rollout is compared with others of its group, and trained."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Finite numbers by name that say something of the rollout and are no part of its reward; None for one that does
    not apply."""

    turn_rewards: Mapping[Any, Any] | None = None
    """Rewards of single turns, finite numbers by ``Reply.index``, 0 for turns that are not there; None without any.
    trainer.loss.advantage turn_return needs them, and looks at no other reward."""

    @classmethod
    def of(cls, returned: Any) -> Outcome:
        """Return what an agent has returned as an outcome.

        A mapping may have ``metrics`` and ``turn_rewards``, as mappings.
        """
        if isinstance(returned, cls):
            return returned
        found = returned if isinstance(returned, Mapping) else {}
        metrics, turn_rewards = (
            value if isinstance(value := found.get(key), Mapping) else None for key in ("metrics", "turn_rewards")
        )
        return cls(returned, metrics=metrics or {}, turn_rewards=turn_rewards)
