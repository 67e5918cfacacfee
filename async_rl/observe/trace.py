"""Writes a run's timeline as a trace that Perfetto and chrome://tracing open: the Trace Event Format, as JSON.

Owns how spans become its events: a process per role, lanes in which nothing overlaps, an arrow from each cut call to
the one that resumed it. Streams: memory holds only the lanes and the cut calls that were not resumed yet.
"""

from __future__ import annotations

import bisect
import heapq
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from async_rl.errors import RunFolderError
from async_rl.observe import spans
from async_rl.observe.spans import Span
from async_rl.runtime.runfolder import to_json

Event = dict[str, Any]


def write_trace(path: Path, out: Path) -> None:
    """Write the spans of the run folder ``path`` to the file ``out``. Raises RunFolderError where there are none."""
    if not path.is_dir():
        raise RunFolderError(f"there is no run folder {path}")
    roles = spans.roles(path)
    if not roles:
        raise RunFolderError(f"{path} has no timeline: it is written when metrics.timeline_bytes is above 0")
    unfinished = out.with_name(out.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate(events(path, roles)):
                stream.write((",\n" if number else "\n") + to_json(event))
            stream.write("\n]}\n")
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


def events(path: Path, roles: list[str]) -> Iterator[Event]:
    """Yield the events of the trace, with times in whole microseconds since 1970."""
    processes = {role: _Process(number, role) for number, role in enumerate(roles, 1)}
    cut: dict[str, tuple[float, Event]] = {}
    flows = 0
    for process in processes.values():
        yield from process.introduction()
    for span in heapq.merge(*(spans.read(path, role) for role in roles), key=lambda span: span.end):
        *introduction, event = processes[span.role].events(span)
        yield from introduction
        yield event
        if (trajectory := span.trajectory) is None:
            continue
        if (before := cut.pop(trajectory, None)) is not None and spans.may_resume(before[0], span):
            flows += 1
            yield from _flow(flows, before[1], event)
        if span.cut:
            cut[trajectory] = (span.end, event)


class _Process:
    """The lanes of one role."""

    def __init__(self, pid: int, role: str) -> None:
        self._pid = pid
        self._role = role
        self._single: dict[str, int] = {}
        self._single_end: dict[str, int] = {}
        # Lanes of calls by when they are free: (end, thread).
        self._lanes: list[tuple[int, int]] = []
        self._threads = 0

    def introduction(self) -> Iterator[Event]:
        yield self._meta("process_name", 0, name=self._role)
        yield self._meta("process_sort_index", 0, sort_index=self._pid)

    def events(self, span: Span) -> list[Event]:
        """Return the span's event, after those that introduce its lane if that is new."""
        begin, end = round(span.at * 1e6), round(span.end * 1e6)
        introduction: list[Event] = []
        if span.what == "call":
            # The lane that became free last gives the fewest lanes, as spans come in the order of their ends.
            place = bisect.bisect_right(self._lanes, (begin, self._threads)) - 1
            if place >= 0:
                _, thread = self._lanes.pop(place)
            else:
                thread = self._thread()
                introduction = self._introduce(thread, f"calls {len(self._lanes) + 1}")
            bisect.insort(self._lanes, (end, thread))
        else:
            lane = "pauses" if span.what == "pause" else "training loop" if self._role == spans.PIPELINE else span.what
            if lane not in self._single:
                self._single[lane] = self._thread()
                introduction = self._introduce(self._single[lane], lane)
            thread = self._single[lane]
            # Spans adjoin, but start and length come from two clocks: keep them from overlapping.
            begin = max(begin, self._single_end.get(lane, begin))
            end = self._single_end[lane] = max(begin, end)
        name = span.trajectory or span.what
        event = {"ph": "X", "name": name, "cat": span.what, "pid": self._pid, "tid": thread, "ts": begin}
        return [*introduction, event | {"dur": end - begin, "args": dict(span.fields)}]

    def _thread(self) -> int:
        self._threads += 1
        return self._threads

    def _introduce(self, thread: int, name: str) -> list[Event]:
        return [
            self._meta("thread_name", thread, name=name),
            self._meta("thread_sort_index", thread, sort_index=thread),
        ]

    def _meta(self, kind: str, thread: int, **arguments: Any) -> Event:
        return {"ph": "M", "name": kind, "pid": self._pid, "tid": thread, "ts": 0, "args": arguments}


def _flow(number: int, cut: Event, resumed: Event) -> Iterator[Event]:
    same = {"name": "resumed", "cat": "resume", "id": number}
    # An arrow belongs to the event that encloses its end.
    last = max(cut["ts"], cut["ts"] + cut["dur"] - 1)
    yield {"ph": "s", **same, "pid": cut["pid"], "tid": cut["tid"], "ts": last}
    yield {"ph": "f", "bp": "e", **same, "pid": resumed["pid"], "tid": resumed["tid"], "ts": resumed["ts"]}
