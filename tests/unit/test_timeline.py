"""Spans of time as they reach the run folder: in order, within a second, the latest of them in bounded files."""

import json

import pytest

from async_rl.metrics import timeline
from async_rl.metrics.timeline import Timeline


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: ``clock[0]`` is what it says."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(timeline.time, "time", lambda: now[0])
    return now


def spans(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_span_says_when_it_began_and_how_long_it_took(tmp_path, clock):
    written = Timeline(tmp_path, "rollout-0", 10_000)
    written.add("call", 2.5, trajectory="0-1.0/3", end="abort")
    assert spans(tmp_path / "timeline" / "rollout-0.jsonl") == [
        {"what": "call", "at": clock[0] - 2.5, "s": 2.5, "trajectory": "0-1.0/3", "end": "abort"}
    ]
    written.close()


def test_spans_reach_the_file_in_order_a_second_later_or_at_the_end(tmp_path, clock):
    path = tmp_path / "timeline" / "pipeline.jsonl"
    written = Timeline(tmp_path, "pipeline", 10_000)
    for step in range(4):
        written.add("update", 0.1, step=step)
    assert [span["step"] for span in spans(path)] == [0]
    clock[0] += 1.1
    written.add("push", 0.1, step=4)
    assert [span["step"] for span in spans(path)] == [0, 1, 2, 3, 4]
    written.add("update", 0.1, step=5)
    written.close()
    written.close()
    written.add("update", 0.1, step=6)
    assert [span["step"] for span in spans(path)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("seconds_each", [0.0, 0.4, 2.0])
def test_the_latest_spans_are_kept_in_bounded_files(tmp_path, clock, seconds_each):
    limit = 4000
    written = Timeline(tmp_path, "rollout-0", limit)
    for number in range(1000):
        written.add("call", 0.1, number=number)
        clock[0] += seconds_each
    written.close()
    before, latest = (tmp_path / "timeline" / f"rollout-0{part}.jsonl" for part in (".1", ""))
    kept = [span["number"] for path in (before, latest) for span in spans(path)]
    assert kept == list(range(1000 - len(kept), 1000))
    line = len(before.read_bytes().splitlines(keepends=True)[-1])
    assert limit / 2 < before.stat().st_size <= limit / 2 + line
    assert latest.stat().st_size <= limit / 2 + line


def test_a_run_that_goes_on_writes_behind_what_is_there(tmp_path):
    for step in range(2):
        written = Timeline(tmp_path, "pipeline", 10_000)
        written.add("update", 0.1, step=step)
        written.close()
    assert [span["step"] for span in spans(tmp_path / "timeline" / "pipeline.jsonl")] == [0, 1]


def test_switched_off_it_writes_nothing(tmp_path):
    written = Timeline(tmp_path, "pipeline", 0)
    written.add("update", 0.1, step=1)
    written.close()
    assert list(tmp_path.iterdir()) == []
