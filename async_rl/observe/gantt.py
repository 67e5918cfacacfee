"""The report's timeline: a few training steps that show how weight syncs cut generations, which are then resumed.

Chooses the window and its contents; ``spans`` reads, ``figures`` draws.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from async_rl.observe import figures, spans
from async_rl.observe.drawing import clock, short
from async_rl.observe.figures import Bar, Lane
from async_rl.observe.history import History
from async_rl.observe.spans import Span

_MOST_ROWS = 40
_MOST_REPLICAS = 8
_MOST_SPANS = 50_000
# How far back the timeline is read: enough to find a window in which something was cut.
_RECENT_STEPS = 200


def timeline(run: History, title: str) -> str:
    """Return the lanes of a few training steps as a figure; a note where there are no spans."""
    roles = spans.roles(run.path)
    loop = list(deque(spans.read(run.path, spans.PIPELINE), maxlen=_MOST_SPANS))
    replicas = [role for role in roles if role != spans.PIPELINE]
    steps = sorted({span.step for span in loop if span.step is not None})[-_RECENT_STEPS:]
    recent = [span for span in loop if span.step is None or (steps and span.step >= steps[0])]
    since = min((span.at for span in recent), default=-math.inf)
    calls = [span for role in replicas for span in spans.read(run.path, role, since)]
    if not recent and not calls:
        return figures.missing(
            title, "No spans were recorded: the run folder has none in timeline/ (metrics.timeline_bytes)."
        )
    ties = [tie for life in spans.lives(calls).values() for tie in spans.resumptions(life)]
    begin, end = spans.window(recent, calls, ties)
    end += 0.06 * (end - begin)  # so that calls cut by the last weight sync are seen resumed
    shown = replicas[:_MOST_REPLICAS]
    lanes = _loop_lanes(spans.overlapping(recent, begin, end), begin)
    in_window = spans.overlapping(calls, begin, end)
    seen = [(cut, next_) for cut, next_ in ties if begin <= cut.end and next_.at <= end]
    rows = max(8, min(_MOST_ROWS, 120 // max(1, len(shown))))
    for role in shown:
        lanes += _replica_lanes(role, [span for span in in_window if span.role == role], seen, begin, rows)
    drawn = {lane.key for lane in lanes}
    tied = [
        (_key(cut), cut.end - begin, _key(next_), next_.at - begin)
        for cut, next_ in seen
        if _key(cut) in drawn and _key(next_) in drawn
    ]
    pushes = [span for span in spans.overlapping(recent, begin, end) if span.what == "push"]
    bands = [(push.at - begin, push.end - begin, f"sync, step {push.step}") for push in pushes]
    legend = [
        ("call that ended by itself", 2, "stop"),
        ("at its length limit", 1, "length"),
        ("cut by a weight sync", 0, "cut"),
    ]
    legend += [("resumed", 0, "tie"), ("weight sync", 3, "band"), ("pause", 6, ""), ("training loop", 5, "")]
    left_out = f", {len(shown)} of {len(replicas)} replicas" if len(replicas) > len(shown) else ""
    return figures.lanes(f"{title}, from {clock(begin)}{left_out}", lanes, end - begin, bands, tied, legend)


def _loop_lanes(loop: Sequence[Span], begin: float) -> list[Lane]:
    known = ("groups", "update", "push", "evaluation", "checkpoint", "restart")
    names = {"groups": "waits for groups"}
    kinds = sorted({span.what for span in loop}, key=lambda what: (known.index(what) if what in known else 9, what))
    return [
        Lane(
            f"loop/{what}",
            names.get(what, what),
            [
                Bar(span.at - begin, span.end - begin, 3 if what == "push" else 5, "", _told(span))
                for span in loop
                if span.what == what
            ],
            "training loop" if not number else "",
            high=True,
        )
        for number, what in enumerate(kinds)
    ]


def _replica_lanes(
    role: str, found: Sequence[Span], ties: Sequence[tuple[Span, Span]], begin: float, most: int
) -> list[Lane]:
    """Return a lane of pauses and one per trajectory, of which cut and resumed ones are preferred beyond ``most``."""
    resumed = {cut.trajectory for cut, _ in ties}
    lives = spans.lives(found)
    chosen = sorted(lives, key=lambda name: (name not in resumed, lives[name][0].at))[:most]
    chosen.sort(key=lambda name: lives[name][0].at)
    looks = {spans.CUT: (0, "cut"), "stop": (2, "stop"), "length": (1, "length")}
    pauses = [Bar(one.at - begin, one.end - begin, 6, "", _told(one)) for one in found if one.what == "pause"]
    of = f", {len(chosen)} of {len(lives)} trajectories" if len(chosen) < len(lives) else ""
    lanes = [Lane(f"{role}/", "pauses", pauses, role + of, high=True)]
    for name in chosen:
        bars = [
            Bar(call.at - begin, call.end - begin, *looks.get(str(call.fields.get("end")), (6, "")), _told(call))
            for call in lives[name]
        ]
        lanes.append(Lane(f"{role}/{name}", name, bars))
    return lanes


def _key(call: Span) -> str:
    return f"{call.role}/{call.trajectory}"


def _told(span: Span) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in span.fields.items())
    return f"{span.what}, {short(span.seconds)} s" + (f"\n{rest}" if rest else "")
