"""The parts of a row of the dashboard, and the expressions that several rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "phases", "versions"]
Hue = Literal["blue", "green", "orange", "red", "purple", "text"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression. hue: its series are shades of this colour; None takes the palette."""

    expr: str
    legend: str = "{{run}}"
    hue: Hue | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str
    """What the panel shows."""
    good: str
    """Good values."""
    turn: str
    """Settings to change when the values are not good, in backticks."""
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    low: float | None = 0
    """Lower end of the axis; None leaves it to the data."""
    high: float | None = None
    steps: tuple[tuple[float, str], ...] = ()
    """(from, colour) above green: the background of a stat, lines elsewhere."""
    centred: bool = False
    """Whether zero is in the middle of the axis."""

    @property
    def description(self) -> str:
        return f"{self.about}\n\n**Good:** {self.good}\n\n**Turn:** {self.turn}"


Band = tuple[Panel | tuple[Panel, ...], ...]
"""Panels side by side; a tuple among them is a column of panels, one above the other, as wide as its first."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    bands: tuple[Band, ...]


NATS = "suffix:nats"
TOKENS_PER_SECOND = "si:tok/s"


def by_staleness(metric: str) -> tuple[Query, ...]:
    """Return queries for all tokens, on-policy ones (staleness 0) and stale ones. An absent label matches ""."""
    return (
        Query(f'{metric}{{staleness=""}}', "{{run}} all tokens", "blue", dashed=True),
        Query(f'{metric}{{staleness="0"}}', "{{run}} on policy (staleness 0)", "green"),
        Query(f'{metric}{{staleness!~"|0"}}', "{{run}} stale by {{staleness}}", "orange"),
    )


def mean(histogram: str, by: str, filters: str = "") -> str:
    """Return the mean of a histogram's observations in the window."""
    total, count = (f"sum by ({by}) (rate({histogram}_{part}{{{filters}}}[$window]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, sum by (run, le) (rate({histogram}_bucket{{}}[$window])))"


def per_second(counter: str, by: str = "run", filters: str = "") -> str:
    return f"sum by ({by}) (rate({counter}{{{filters}}}[$window]))"
