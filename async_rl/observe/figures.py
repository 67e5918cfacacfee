"""Figures as SVG inside HTML: curves, stacked areas, histograms, heat maps, lanes of time.

Knows numbers and labels only, and escapes every text. Colours are the classes of ``drawing.STYLE``; dashes, marks and
shapes repeat what they distinguish. Values are shown as tooltips, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from async_rl.observe.drawing import BINS, COLOURS, Points, Scale, binned, short, text
from async_rl.observe.rows import Number

_W, _H = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 38
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 3")
_MOST_POINTS = 800
_COLUMNS = 56


@dataclass(frozen=True, slots=True)
class Series:
    """A curve."""

    label: str
    xs: Sequence[float]
    """Ascending."""
    ys: Sequence[Number]
    """A value that is None is not drawn."""
    colour: int = 0
    """Index into the palette."""
    dash: int = 0
    """Index into the dash patterns."""
    marks: bool = False
    """Whether to mark each value, for curves of few values."""

    @property
    def points(self) -> Points:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A span in a lane of ``lanes``: from ``begin`` to ``end`` in seconds; shape: "cut", "stop", "length" or ""."""

    begin: float
    end: float
    colour: int
    shape: str
    title: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A row. key: what ties name it by; heading: drawn above it where another group of rows begins."""

    key: str
    label: str
    bars: Sequence[Bar]
    heading: str = ""
    high: bool = False


def curves(title: str, unit: str, series: Sequence[Series], *, log: bool | None = False, zero: bool = False) -> str:
    """Draw curves against the training step. log: None lets the values decide; zero: the axis includes 0."""
    drawn = [(one, points) for one in series if (points := one.points)]
    if not drawn:
        return missing(title, "No step has a value.")
    values = [y for _, points in drawn for _, y in points]
    positive = [value for value in values if value > 0]
    if log is None:
        log = len(positive) > 0.9 * len(values) and min(values) >= 0 and max(positive) > 100 * min(positive)
    # Within a decade a linear axis has more useful ticks.
    log = log and bool(positive) and max(positive) > 10 * min(positive)
    floor = min(positive) if log else -math.inf
    x = Scale(*_range(px for _, points in drawn for px, _ in points), _LEFT, _W - _RIGHT, pad=False)
    low, high = _range([max(floor, value) for value in values] + ([0.0] if zero and not log else []))
    if low == high == 0:
        high = 1.0
    y = Scale(low, high, _H - _BOTTOM, _TOP, log=log)

    def at(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{x(px):.1f},{y(max(floor, py)):.1f}" for px, py in points)

    body = [_axes(x, y)]
    for one, points in drawn:
        dash = f' stroke-dasharray="{_DASHES[one.dash % len(_DASHES)]}"' if one.dash % len(_DASHES) else ""
        body.append(f'<g class="s{one.colour % COLOURS}">')
        if len(points) > _MOST_POINTS:
            bins = binned(points)
            body.append(f'<polygon class="band" points="{at(bins.low)} {at(reversed(bins.high))}"/>')
            smooth = _running_mean(bins.mean)
        elif len(points) > 60 and not one.marks:
            body.append(f'<polyline class="raw" points="{at(points)}"/>')
            smooth = _running_mean(points)
        else:
            smooth = points
        body.append(f'<polyline class="line"{dash} points="{at(smooth)}"/>')
        if one.marks or len(points) < 20:
            shown = smooth if len(smooth) < 100 else []
            body += [
                f'<circle class="fill" cx="{x(px):.1f}" cy="{y(max(floor, py)):.1f}" r="2.6"/>' for px, py in shown
            ]
        body.append("</g>")
    body.append(_columns(x, [(one.label, points) for one, points in drawn]))
    legend = [_key(one.label, one.colour, one.dash, "line") for one, _ in drawn]
    legend += [f"<span>{text(one.label)}: no value</span>" for one in series if not one.points]
    return _figure(title, unit + (", log scale" if log else ""), _svg(title, body), legend if len(series) > 1 else [])


def stacked(title: str, unit: str, xs: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Draw stacked areas, the first at the bottom; means of bins where there are many values."""
    if not xs or not parts:
        return missing(title, "No step has a value.")
    thin = [binned(list(zip(xs, ys, strict=True)), min(BINS // 2, len(xs))).mean for _, ys in parts]
    sums = list(zip(*(accumulate(py for _, py in column) for column in zip(*thin, strict=True)), strict=True))
    x = Scale(*_range([px for px, _ in thin[0]]), _LEFT, _W - _RIGHT, pad=False)
    y = Scale(0.0, max(sums[-1]) * 1.05 or 1.0, _H - _BOTTOM, _TOP, pad=False)
    across = [x(px) for px, _ in thin[0]]
    body = [_axes(x, y)]
    below, named = [0.0] * len(across), list[str]()
    for number, above in enumerate(sums):
        upper = " ".join(f"{px:.1f},{y(v):.1f}" for px, v in zip(across, above, strict=True))
        lower = " ".join(f"{px:.1f},{y(v):.1f}" for px, v in reversed(list(zip(across, below, strict=True))))
        body.append(f'<polygon class="area s{number % COLOURS}" points="{upper} {lower}"/>')
        middle, name = len(across) // 2, text(parts[number][0])
        top, bottom = y(above[middle]), y(below[middle])
        if bottom - top > 18:
            named.append(f'<text class="strong" x="{_LEFT + 14}" y="{(top + bottom) / 2 + 4:.1f}">{name}</text>')
        below = list(above)
    body += named
    body.append(_columns(x, [(label, points) for (label, _), points in zip(parts, thin, strict=True)]))
    legend = [_key(label, number, 0, "box") for number, (label, _) in enumerate(parts)][::-1]
    return _figure(title, unit, _svg(title, body), legend)


def histogram(title: str, x_label: str, bars: Sequence[tuple[str, float]]) -> str:
    """Draw shares of the whole, each with its label below and its percentage above."""
    whole = sum(value for _, value in bars)
    if not whole:
        return missing(title, "Nothing was counted.")
    y = Scale(0.0, max(value / whole for _, value in bars) * 112, _H - _BOTTOM, _TOP, pad=False)
    width = (_W - _LEFT - _RIGHT) / max(4, len(bars))
    body = [_axes(None, y, x_label)]
    for number, (label, value) in enumerate(bars):
        left, top, share = _LEFT + number * width, y(100 * value / whole), 100 * value / whole
        body.append(
            f'<rect class="bar s0" x="{left + width * 0.12:.1f}" y="{top:.1f}" width="{width * 0.76:.1f}" '
            f'height="{_H - _BOTTOM - top:.1f}"><title>{text(label)}: {short(value)} of {short(whole)}</title></rect>'
            f'<text class="strong" x="{left + width / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle">{share:.1f}</text>'
            f'<text x="{left + width / 2:.1f}" y="{_H - _BOTTOM + 14}" text-anchor="middle">{text(label)}</text>'
        )
    return _figure(title, "%", _svg(title, body), [])


def heat_map(
    title: str, y_label: str, spans: Sequence[tuple[float, float]], rows: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """Draw shares from 0 to 1 over training steps: a column for each of ``spans``, a row for each label."""
    if not spans or not rows:
        return missing(title, "Nothing was counted.")
    x = Scale(spans[0][0] - 0.5, spans[-1][1] + 0.5, _LEFT, _W - _RIGHT, pad=False)
    height = (_H - _BOTTOM - _TOP) / len(rows)
    body = [_axes(x, None)]
    for number, (label, shares) in enumerate(rows):
        top = _H - _BOTTOM - (number + 1) * height
        body.append(f'<text x="{_LEFT - 8}" y="{top + height / 2 + 4:.1f}" text-anchor="end">{text(label)}</text>')
        for (first, last), share in zip(spans, shares, strict=True):
            if share > 0:
                left, right = x(first - 0.5), x(last + 0.5)
                steps = f"step {first:.0f}" if first == last else f"steps {first:.0f} to {last:.0f}"
                body.append(
                    f'<rect class="fill s0" shape-rendering="crispEdges" fill-opacity="{max(0.03, share):.2f}" '
                    f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{height:.1f}">'
                    f"<title>{steps}, {text(label)}: {share:.1%}</title></rect>"
                )
    cells = "".join(
        f'<rect class="fill s0" fill-opacity="{max(0.03, n / 5):.2f}" x="{n * 14}" width="14" height="10"/>'
        for n in range(6)
    )
    scale = f'<svg width="84" height="10" viewBox="0 0 84 10" aria-hidden="true">{cells}</svg>'
    return _figure(title, y_label, _svg(title, body), [f"<span>0 %{scale}100 % of the step's tokens</span>"])


def lanes(
    title: str,
    rows: Sequence[Lane],
    window: float,
    bands: Sequence[tuple[float, float, str]],
    ties: Sequence[tuple[str, float, str, float]],
    legend: Sequence[tuple[str, int, str]],
) -> str:
    """Draw spans of time in a window of ``window`` seconds, a lane for each row.

    bands: (begin, end, label) over all lanes; ties: (lane, end of one bar, lane, begin of the bar that resumes it);
    legend: (label, colour, shape), the shape of a bar or "band" or "tie".
    """
    wide, left, top = 1120, 128, 24
    x = Scale(0.0, window, left, wide - 8, pad=False)

    def clip(at: float) -> float:
        return x(min(max(at, 0.0), window))

    places: dict[str, tuple[float, float]] = {}
    body: list[str] = []
    down = float(top)
    for lane in rows:
        if lane.heading:
            down += 22
            body.append(f'<text class="strong" x="0" y="{down - 6:.0f}">{text(lane.heading)}</text>')
        height = 13.0 if lane.high else 8.0
        places[lane.key] = (down, height)
        size, name = "" if lane.high else ' class="small"', text(lane.label[-22:])
        body.append(
            f'<text{size} x="{left - 8}" y="{down + height - 1.5:.1f}" text-anchor="end">{name}</text>'
            f'<path class="grid" d="M{left} {down + height + 1.5:.1f}H{wide - 8}"/>'
        )
        body += [_bar(bar, clip(bar.begin), clip(bar.end), down, height, whole=bar.end <= window) for bar in lane.bars]
        down += height + 3
    behind: list[str] = []
    for begin, end, label in bands:
        first, last = clip(begin), clip(end)
        behind.append(
            f'<rect class="push" x="{first:.1f}" y="{top - 4}" width="{max(1.0, last - first):.1f}" '
            f'height="{down - top + 4:.1f}"/>'
        )
        if last - first > 1.5 or len(bands) < 3:
            middle = min(max((first + last) / 2, left + 30), wide - 40)
            behind.append(
                f'<text class="small" x="{middle:.1f}" y="{top - 9}" text-anchor="middle">{text(label)}</text>'
            )
    for cut, cut_at, resumed, resumed_at in ties:
        (y1, h1), (y2, h2) = places[cut], places[resumed]
        x1, x2, y1, y2 = clip(cut_at), clip(resumed_at), y1 + h1 / 2, y2 + h2 / 2
        middle = (x1 + x2) / 2
        body.append(
            f'<path class="tie" d="M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"/>'
        )
    for value, label in x.ticks(10):
        body.append(
            f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{down:.0f}" y2="{down + 4:.0f}"/>'
            f'<text x="{x(value):.1f}" y="{down + 17:.0f}" text-anchor="middle">{label}</text>'
        )
    body.append(
        f'<line class="axis" x1="{left}" x2="{wide - 8}" y1="{down:.0f}" y2="{down:.0f}"/>'
        f'<text x="{wide - 8}" y="{down + 32:.0f}" text-anchor="end">seconds in this window</text>'
    )
    keys = [_key(label, colour, 0, shape) for label, colour, shape in legend]
    return _figure(title, "", _svg(title, behind + body, wide, math.ceil(down + 36)), keys, "wide")


def missing(title: str, why: str) -> str:
    """Return a note in place of a figure."""
    return f'<figure><figcaption><b>{text(title)}</b></figcaption><p class="missing">{text(why)}</p></figure>'


def _bar(bar: Bar, left: float, right: float, top: float, height: float, *, whole: bool = True) -> str:
    """Draw a bar; whole: whether its end lies within the window."""
    width = max(1.5, right - left)
    inset = 0.7 if bar.shape == "cut" else 0.0
    kind = "bar cut" if bar.shape == "cut" else "bar"
    drawn = (
        f'<rect class="{kind} s{bar.colour % COLOURS}" x="{left + inset:.1f}" y="{top + inset:.1f}" '
        f'width="{max(0.5, width - 2 * inset):.1f}" height="{height - 2 * inset:.1f}">'
        f"<title>{text(bar.title)}</title></rect>"
    )
    if bar.shape == "length" and whole:
        drawn += (
            f'<rect class="mark" x="{left + width - 2:.1f}" y="{top - 1:.1f}" width="2" height="{height + 2:.1f}"/>'
        )
    return drawn


def _axes(x: Scale | None, y: Scale | None, x_label: str = "training step") -> str:
    drawn = []
    bottom = _H - _BOTTOM
    for value, label in y.ticks() if y is not None else ():
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
            if y is not None
            else ""
        )
    drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    if x is not None:
        drawn += [
            f'<text x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>'
            for value, label in x.ticks(7)
            if value == round(value)
        ]
    drawn.append(f'<text x="{_W - _RIGHT}" y="{_H - 5}" text-anchor="end">{text(x_label)}</text>')
    return "".join(drawn)


def _columns(x: Scale, series: Sequence[tuple[str, Points]]) -> str:
    """Draw invisible columns whose tooltips give the values at the pointer."""
    first, last = _range(px for _, points in series for px, _ in points)
    width = (last - first) / _COLUMNS or 1.0
    said: dict[int, list[str]] = {}
    for label, points in series:
        found: dict[int, list[float]] = {}
        for px, py in points:
            found.setdefault(min(_COLUMNS - 1, int((px - first) / width)), []).append(py)
        for column, ys in found.items():
            spread = f" ({short(min(ys))} to {short(max(ys))})" if len(ys) > 1 else ""
            said.setdefault(column, []).append(f"{label}: {short(math.fsum(ys) / len(ys))}{spread}")
    drawn = []
    for column, lines in said.items():
        begin, end = first + column * width, min(last, first + (column + 1) * width)
        left, right = x(begin), max(x(begin) + 3, x(end))
        where = f"about step {(begin + end) / 2:.0f}"
        drawn.append(
            f'<rect class="see" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_H - _BOTTOM - _TOP}">'
            f"<title>{text(chr(10).join([where, *lines]))}</title></rect>"
        )
    return "".join(drawn)


def _running_mean(points: Points) -> Points:
    """Return the running mean over a fortieth of the points."""
    half = len(points) // 80
    if not half:
        return points
    sums = [0.0, *accumulate(y for _, y in points)]
    spans = ((max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points)))
    return [(px, (sums[b] - sums[a]) / (b - a)) for (px, _), (a, b) in zip(points, spans, strict=True)]


def _key(label: str, colour: int, dash: int, shape: str) -> str:
    """Return an entry of a legend."""
    shapes: dict[str, Callable[[], str]] = {
        "line": lambda: f'<line class="line" stroke-dasharray="{_DASHES[dash % len(_DASHES)]}" x2="26" y1="5" y2="5"/>',
        "band": lambda: '<rect class="push" x="8" width="10" height="10"/>',
        "tie": lambda: '<path class="tie" d="M0 5H26"/>',
    }
    bar = Bar(0, 1, colour, shape, label)
    drawn = shapes[shape]() if shape in shapes else _bar(bar, 1, 25, 1, 8)
    sample = (
        f'<svg class="s{colour % COLOURS}" width="26" height="10" viewBox="0 0 26 10" aria-hidden="true">{drawn}</svg>'
    )
    return f"<span>{sample}{text(label)}</span>"


def _figure(title: str, unit: str, svg: str, legend: Sequence[str], kind: str = "") -> str:
    keys = f'<div class="legend">{"".join(legend)}</div>' if legend else ""
    said = f" <small>{text(unit)}</small>" if unit else ""
    return f'<figure class="{kind}"><figcaption><b>{text(title)}</b>{said}</figcaption>{keys}{svg}</figure>'


def _svg(title: str, body: Iterable[str], wide: int = _W, high: int = _H) -> str:
    return f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{text(title)}">{"".join(body)}</svg>'


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
