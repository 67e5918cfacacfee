"""The spans of a run's ``timeline`` folder (``metrics.timeline`` writes them), read back; and what they say together.

Owns the life of a trajectory: its engine calls in order, over all replicas, and which call went on where another was
cut. A file is in the order of the ends of its spans, which lets readers stream it.
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
"""The ``end`` of a call that a push ended."""

_NAME = re.compile(r"(?P<role>.+?)(\.1)?\.jsonl")
_BEGIN = b'{"what":'
_WINDOW_STEPS = 4
_RARE = ("evaluation", "restart")
_WINDOW_S = 30.0
# Start and length of a span come from two clocks.
_CLOCKS_S = 1e-3


@dataclass(frozen=True, slots=True)
class Span:
    """role: which process; at: its begin, in seconds since 1970; seconds: how long; fields: what else the line says."""

    role: str
    what: str
    at: float
    seconds: float
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.at + self.seconds

    @property
    def cut(self) -> bool:
        return self.what == "call" and self.fields.get("end") == CUT

    @property
    def step(self) -> int | None:
        """Training step of a span of the pipeline."""
        step = self.fields.get("step")
        return step if isinstance(step, int) else None

    @property
    def trajectory(self) -> str | None:
        """Of a call."""
        found = self.fields.get("trajectory")
        return str(found) if self.what == "call" and found is not None else None


def roles(path: Path) -> list[str]:
    """Who has spans in the run folder ``path``: the pipeline first, replicas in the order of their numbers."""
    names = [other.name for other in (path / TIMELINE).iterdir()] if (path / TIMELINE).is_dir() else []
    found = {match["role"] for name in names if (match := _NAME.fullmatch(name))}
    return sorted(found, key=_natural)


def read(path: Path, role: str, since: float = -math.inf) -> Iterator[Span]:
    """The spans of one role that ended at ``since`` or later, in the order of their ends.

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
    """Those that have a part in the window from ``begin`` to ``end``, in seconds since 1970; by their begin."""
    return sorted((span for span in spans if span.at < end and span.end > begin), key=lambda span: span.at)


def lives(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """The calls of each trajectory in order, whichever replicas made them."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        if (trajectory := span.trajectory) is not None:
            found.setdefault(trajectory, []).append(span)
    for calls in found.values():
        calls.sort(key=lambda call: call.at)
    return found


def resumptions(calls: Sequence[Span]) -> list[tuple[Span, Span]]:
    """Each cut call of a life with the one that went on where it ended."""
    return [(cut, next_) for cut, next_ in pairwise(calls) if cut.cut and goes_on(cut.end, next_)]


def window(loop: Sequence[Span], calls: Sequence[Span], ties: Sequence[tuple[Span, Span]]) -> tuple[float, float]:
    """The last few training steps with a push, and with a trajectory that was cut and resumed in them, and best without
    an evaluation or a restart beside which all else looks short; the last ones where none has both. From and to, in
    seconds since 1970.

    loop: the spans of the pipeline; ties: ``resumptions`` of the calls. Raises ValueError where there is no span.
    """
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    latest_step = -1
    for span in loop:
        if (step := span.step) is None:
            continue
        if step < latest_step:  # training went back to a checkpoint
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
        # A run that was stopped and went on the next day has steps that are a night apart.
        if pushed and stood < (end - begin) / 2 and any(resumed < end for _, resumed in after):
            if sum(span.seconds for span in overlapping(rare, begin, end)) < (end - begin) / 4:
                return begin, end
            second_best = second_best or (begin, end)
    return second_best or (begins[steps[-size]], ends[steps[-1]])


def goes_on(cut_at: float, call: Span) -> bool:
    """Whether ``call`` can be what resumed a call that was cut at ``cut_at``."""
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
            # A replica that was killed within a line is followed by its replacement, which goes on in the same line.
            whole = line[max(0, line.rfind(_BEGIN)) :]
            try:
                yield _span(role, json.loads(whole))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                raise RunFolderError(f"{path}:{number} is no span: {line[:60]!r}; is it damaged?") from None


def _span(role: str, line: dict[str, Any]) -> Span:
    rest = {key: value for key, value in line.items() if key not in ("what", "at", "s")}
    at, seconds = float(line["at"]), float(line["s"])
    if not isinstance(line["what"], str) or not math.isfinite(at) or not 0 <= seconds < math.inf:
        raise ValueError
    return Span(role, line["what"], at, seconds, rest)
