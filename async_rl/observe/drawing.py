"""What all figures share: texts and numbers for people, scales, bins, and the colours.

Knows numbers and labels only. Colours are classes (``STYLE`` gives them for light and dark), chosen so that
colour-blind eyes can distinguish them.
"""

from __future__ import annotations

import datetime
import html
import math
import re
from dataclasses import dataclass

Points = list[tuple[float, float]]

BINS = 400
COLOURS = 7

STYLE = """
:root{--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b5549a;--c4:#b58900;--c5:#3aa0d8;--c6:#6b6b6b}
@media (prefers-color-scheme:dark){:root{--c0:#56b4e9;--c1:#f08a4b;--c2:#2fc295;--c3:#d992bd;--c4:#f0e442;--c5:#3d8fd1;
--c6:#a8a8a8}}
.s0{--s:var(--c0)}.s1{--s:var(--c1)}.s2{--s:var(--c2)}.s3{--s:var(--c3)}.s4{--s:var(--c4)}.s5{--s:var(--c5)}
.s6{--s:var(--c6)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .strong{fill:var(--ink);font-weight:600}svg .small{font-size:9px}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:var(--s);stroke-width:1.8;stroke-linejoin:round}.raw{fill:none;stroke:var(--s);stroke-width:.7;
opacity:.35}.band{fill:var(--s);opacity:.18}.fill{fill:var(--s)}.area{fill:var(--s);fill-opacity:.75;stroke:var(--page);
stroke-width:.8}.see{fill:transparent}.see:hover{fill:var(--soft);fill-opacity:.16}
.push{fill:var(--c3);opacity:.16}.bar{fill:var(--s)}.bar:hover{stroke:var(--ink);stroke-width:1.2}
.cut{fill:var(--page);stroke:var(--s);stroke-width:1.4}.tie{fill:none;stroke:var(--ink);stroke-width:1.1;
stroke-dasharray:2 2}.mark{fill:var(--ink)}
"""


@dataclass(frozen=True, slots=True)
class Binned:
    """Mean, smallest and largest of each bin."""

    mean: Points
    low: Points
    high: Points


def binned(points: Points, bins: int = BINS) -> Binned:
    """Put points into bins of the same width; bins without a point are left out."""
    first, width = points[0][0], (points[-1][0] - points[0][0]) / bins or 1.0
    found: dict[int, Points] = {}
    for x, y in points:
        found.setdefault(min(bins - 1, int((x - first) / width)), []).append((x, y))
    mean, low, high = Points(), Points(), Points()
    for part in found.values():
        x = sum(x for x, _ in part) / len(part)
        ys = [y for _, y in part]
        mean.append((x, math.fsum(ys) / len(ys)))
        low.append((x, min(ys)))
        high.append((x, max(ys)))
    return Binned(mean, low, high)


def text(value: object) -> str:
    """Return a value of a run folder as text that is harmless in HTML and in its attributes."""
    return html.escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\U0010ffff]", "\ufffd", str(value)))


def short(value: float, digits: int = 3) -> str:
    """Format a number for people: 0.25, 1.2k, 1e-7."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.9995e-3 or size >= 1e15:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * 0.9995:
            return f"{float(f'{value / factor:.{digits}g}'):g}{unit}"
    return f"{float(f'{value:.{digits}g}'):.12g}"


class Scale:
    """Maps values to pixels, and chooses the ticks."""

    def __init__(
        self, low: float, high: float, begin: float, end: float, *, log: bool = False, pad: bool = True
    ) -> None:
        self._log = log
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        if high <= low:
            margin = 0.5 if log else abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        elif pad:
            low, high = low - (high - low) * 0.04, high + (high - low) * 0.04
        self._low, self._high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self._log else value
        return self._begin + (at - self._low) / (self._high - self._low) * (self._end - self._begin)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Return the ticks' values with their labels."""
        if self._log and self._high - self._low > 1.2:
            every = max(1, math.ceil((self._high - self._low) / most))
            exponents = range(math.ceil(self._low), math.floor(self._high) + 1)
            return [(10.0**e, short(10.0**e)) for e in exponents if e % every == 0]
        low, high = (10**self._low, 10**self._high) if self._log else (self._low, self._high)
        rough = (high - low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
        values = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        digits = next((d for d in range(2, 12) if all(abs(float(f"{v:.{d}g}") - v) < step * 0.01 for v in values)), 12)
        return [(value, short(value, digits)) for value in values]


def clock(seconds: float) -> str:
    """Format a time in UTC, so that a report is the same wherever it is written."""
    if not seconds:
        return "at an unknown time"
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"
