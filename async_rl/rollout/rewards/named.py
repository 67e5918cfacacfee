"""The rewards of a run by name, as the settings have them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from async_rl.config.inputs import RewardSection


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward by name, so that any process can import it."""

    setting: str
    """The setting that names it."""
    function: str
    """``module:function``, or ``verl:module:function`` or ``trl:module:function`` in these conventions."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by name that the settings give."""
    slow: bool | None = None
    """Whether it runs in worker processes; None for what reward.slow says."""
    applies_to: frozenset[str] | None = None
    """The names of the sources and evaluation sets whose responses it scores; None for all."""

    @property
    def form(self) -> str:
        """The convention that it follows: "verl", "trl", or "" for our own."""
        return self.function.rpartition(":")[0].rpartition(":")[0]

    @property
    def module(self) -> str:
        """The module to import."""
        return self.function.removeprefix(f"{self.form}:").partition(":")[0]


def rewards_of(settings: RewardSection) -> list[NamedReward]:
    """Return the rewards of a run: those of reward.functions if there are any, else reward.function."""
    if not settings.functions:
        return [NamedReward("reward.function", settings.function, settings.arguments)]
    return [
        NamedReward(
            f"reward.functions.{name}",
            each.function,
            each.arguments,
            each.slow,
            None if each.applies_to is None else frozenset(each.applies_to),
        )
        for name, each in settings.functions.items()
    ]
