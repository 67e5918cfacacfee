"""Reads the spans of a run's ``timeline`` folder, which ``metrics.timeline`` writes, and relates them to each other.

Owns the life of a trajectory: its engine calls in order, over all replicas, and which call resumed which. A file is in
the order of the ends of its spans, which lets readers stream it.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from async_rl.errors import RunFolderError
from async_rl.runtime.runfolder import TIMELINE

PIPELINE = "pipeline"
CUT = "abort"
"""The ``end`` of a call that a weight sync ended."""

_NAME = re.compile(r"(?P<role>.+?)(\.1)?\.jsonl")
_BEGIN = b'{"what":'
_WINDOW_STEPS = 4
_RARE = ("evaluation", "restart")
_WINDOW_S = 30.0
# Start and length of a span come from two clocks.
_CLOCKS_S = 1e-3


@dataclass(frozen=True, slots=True)
class Span:
    """One span of time of one process."""

    role: str
    """The process."""
    what: str
    """What the process did: "call", "pause", or a phase of the training loop."""
    at: float
    """Begin, in seconds since 1970."""
    seconds: float
    """Length."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the line."""

    @property
    def end(self) -> float:
        return self.at + self.seconds

    @property
    def cut(self) -> bool:
        return self.what == "call" and self.fields.get("end") == CUT

    @property
    def step(self) -> int | None:
        """Training step of a span of the driver."""
        step = self.fields.get("step")
        return step if isinstance(step, int) else None

    @property
    def trajectory(self) -> str | None:
        """Trajectory of a call."""
        found = self.fields.get("trajectory")
        return str(found) if self.what == "call" and found is not None else None


def roles(path: Path) -> list[str]:
    """Return the roles that have spans in the run folder ``path``: the driver first, replicas by their numbers."""
    names = [other.name for other in (path / TIMELINE).iterdir()] if (path / TIMELINE).is_dir() else []
    found = {match["role"] for name in names if (match := _NAME.fullmatch(name))}
    return sorted(found, key=_natural)


def read(path: Path, role: str, since: float = -math.inf) -> Iterator[Span]:
    """Yield the spans of one role that ended at ``since`` or later, in the order of their ends.

    A last line without its end is being written, or was when its writer was killed, and is left out. Raises
    RunFolderError for damage that no killed writer explains.
    """
    folder = path / TIMELINE
    older, latest = folder / f"{role}.1.jsonl", folder / f"{role}.jsonl"
    first = next(_spans(latest, role), None)
    if first is None or first.end >= since:
        yield from (span for span in _spans(older, role) if span.end >= since)
    yield from (span for span in _spans(latest, role) if span.end >= since)


def overlapping(spans: Iterable[Span], begin: float, end: float) -> list[Span]:
    """Return the spans that overlap the window from ``begin`` to ``end``, in seconds since 1970, by their begin."""
    return sorted((span for span in spans if span.at < end and span.end > begin), key=lambda span: span.at)


def lives(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Return the calls of each trajectory in order, whichever replicas made them."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        if (trajectory := span.trajectory) is not None:
            found.setdefault(trajectory, []).append(span)
    for calls in found.values():
        calls.sort(key=lambda call: call.at)
    return found


def resumptions(calls: Sequence[Span]) -> list[tuple[Span, Span]]:
    """Return each cut call of a life with the call that resumed it."""
    return [(cut, next_) for cut, next_ in pairwise(calls) if cut.cut and may_resume(cut.end, next_)]


def window(loop: Sequence[Span], calls: Sequence[Span], ties: Sequence[tuple[Span, Span]]) -> tuple[float, float]:
    """Choose the last few training steps that show a weight sync and a trajectory that was cut and resumed.

    Prefers steps without a long evaluation or restart, next to which all else looks short; takes the last steps where
    none has both. Returns begin and end in seconds since 1970. loop: the spans of the driver; ties: ``resumptions`` of
    the calls. Raises ValueError where there is no span.
    """
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    latest_step = -1
    for span in loop:
        if (step := span.step) is None:
            continue
        if step < latest_step:  # training was rewound to a checkpoint
            begins = {other: at for other, at in begins.items() if other < step}
        latest_step = step
        begins[step] = min(span.at, begins.get(step, math.inf))
        ends[step] = span.end
    steps = sorted(begins)
    if not steps:
        last = max(span.end for span in (*loop, *calls))
        return max(last - _WINDOW_S, min(span.at for span in (*loop, *calls))), last
    cuts = sorted((cut.end, resumed.at) for cut, resumed in ties)
    pushes = sorted(span.at for span in loop if span.what == "push")
    rare = [span for span in loop if span.what in _RARE]
    size = min(_WINDOW_STEPS, len(steps))
    second_best: tuple[float, float] | None = None
    for first in range(len(steps) - size, -1, -1):
        chosen = steps[first : first + size]
        begin, end = begins[chosen[0]], ends[chosen[-1]]
        stood = max((begins[b] - ends[a] for a, b in pairwise(chosen)), default=0.0)
        pushed = bisect.bisect_left(pushes, begin) < bisect.bisect_left(pushes, end)
        after = cuts[bisect.bisect_left(cuts, (begin, 0.0)) : bisect.bisect_left(cuts, (end, 0.0))]
        # A run that was stopped and resumed the next day has steps that are a night apart.
        if pushed and stood < (end - begin) / 2 and any(resumed < end for _, resumed in after):
            if sum(span.seconds for span in overlapping(rare, begin, end)) < (end - begin) / 4:
                return begin, end
            second_best = second_best or (begin, end)
    return second_best or (begins[steps[-size]], ends[steps[-1]])


def may_resume(cut_at: float, call: Span) -> bool:
    """Return whether ``call`` may have resumed a call that was cut at ``cut_at``."""
    return call.at >= cut_at - _CLOCKS_S


def _natural(role: str) -> tuple[bool, list[tuple[int, str]]]:
    parts = re.split(r"(\d+)", role)
    return role != PIPELINE, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _spans(path: Path, role: str) -> Iterator[Span]:
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            # The replacement of a replica that was killed within a line continues in the same line.
            whole = line[max(0, line.rfind(_BEGIN)) :]
            try:
                yield _span(role, json.loads(whole))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                raise RunFolderError(
                    f"{path}:{number} is not a span: {line[:60]!r} (the file may be damaged)"
                ) from None


def _span(role: str, line: dict[str, Any]) -> Span:
    rest = {key: value for key, value in line.items() if key not in ("what", "at", "s")}
    at, seconds = float(line["at"]), float(line["s"])
    if not isinstance(line["what"], str) or not math.isfinite(at) or not 0 <= seconds < math.inf:
        raise ValueError
    return Span(role, line["what"], at, seconds, rest)
