"""The declaration of one metric, and the values that a training step's record gives for it. Pure.

``declared`` has the list of all metrics; ``publish`` applies their ``read`` to records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from async_rl.metrics.records import StepRecord

PREFIX = "async_rl_"

Kind = Literal["counter", "gauge", "histogram"]
Parts = Mapping[int, float | None] | Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Split:
    """A gauge's value over everything, and its values by the gauge's only label."""

    whole: float | None
    parts: Parts


Value = float | None | Parts | tuple[float, ...] | Split
"""A number; None for no value; a mapping by the metric's only label (for a histogram: observed value -> count); a tuple
of observations; or a Split."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric of a run."""

    name: str
    """Name without the prefix ``async_rl_``."""
    kind: Kind
    help: str
    """One sentence: what is measured."""
    how_to_read: str
    """One sentence: which values are good, and what a bad one means."""
    read: Callable[[StepRecord], Value] | None = None
    """Returns a training step's value; None for a metric that is counted elsewhere."""
    unit: str = ""
    labels: tuple[str, ...] = ()
    """Labels that every emission has."""
    whole: bool = False
    """Whether the metric is also emitted without its label, for the value over all labels. Only for means and extremes,
    which cannot be summed over labels."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, ascending; +Inf is implied."""
    values: tuple[str, ...] = ()
    """Known values of a counter's only label. They start at 0, so that the first count is a rise."""
    label_value: str = ""
    """Value of the only label where it is always the same."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def fixed_labels(self) -> dict[str, str]:
        """The labels that are the same in every emission."""
        return {self.labels[0]: self.label_value} if self.label_value else {}


def series_key(name: str, labels: Mapping[str, str]) -> str:
    """Return a series as written in logs, for example ``ppo_kl{staleness="0"}``."""
    if not labels:
        return name
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
