import fcntl
import io
import json
import os
import pty
import threading
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from async_rl.errors import RunFolderError
from async_rl.metrics.publish import step_row
from async_rl.observe.watch import RECENT, Curve, Story, picture, watch
from tests.support.step_records import step_record

NOW = 1_800_000_100.0


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def a_run(folder, rows=(), *, steps=100, events=(), summary=None, name="demo"):
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {name}\ntrainer:\n  steps: {steps}\n")
    (folder / "format").write_text("1\n")
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "logs" / "pipeline.jsonl", events)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path, rows, mode="w"):
    with path.open(mode) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def rows_to(last, first=1, **changes):
    made = []
    for step in range(first, last + 1):
        moment = {"step": step, "elapsed_s": 3.0 * step, "time": NOW - 7, "policy_version": step - 1}
        made.append(step_row(step_record(**{**moment, **changes})))
    return made


@contextmanager
def driven(folder):
    """While a process that drives the run lives."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shown(story, width=80, height=24, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=width, height=height)
    console.print(picture(story, NOW, width, height, **options))
    return stream.getvalue()


def shown_of(folder, **options):
    return shown(Story(folder), **options)


def assert_fits(text, width=80, height=24):
    lines = text.splitlines()
    assert len(lines) < height, "the last line is the prompt's"
    assert {len(line) for line in lines} == {width}


def event(text, level="info", at="2027-01-15T08:01:00+00:00", **more):
    return {"event": text, "level": level, "timestamp": at, **more}


NULLS = dict.fromkeys(step_row(step_record()))
SOME_NULLS = {**step_row(step_record()), "ppo_kl_by_staleness": {"0": None, "2": None}, "token_staleness": {"0": None}}
SYNC_WITHOUT_TOTAL = {
    **step_row(step_record()),
    "sync_seconds": {},
    "replica_versions": {"0": None},
    "tokens_masked": None,
}
OTHER_TYPES = {"step": "one", "ppo_kl_by_staleness": [], "replica_versions": 3, "token_staleness": {"old": 3}}
PICTURES = {
    "no rows": [],
    "one row": rows_to(1),
    "many rows": rows_to(600),
    "all null": [NULLS] * 3,
    "some null": [SOME_NULLS, SYNC_WITHOUT_TOTAL, *rows_to(1), SOME_NULLS],
    "empty rows": [{}, {}],
    "other types": [OTHER_TYPES],
    "eight replicas": rows_to(9_999_999, 9_999_998, replica_versions={i: 9_999_990 - i for i in range(8)}),
    "64 replicas": rows_to(3, replica_versions=dict.fromkeys(range(64), 2)),
    "ten million steps": rows_to(10_000_000, 9_999_990),
    "numbers of many digits": rows_to(3, reward_mean=-1.23456e-105, queue_bytes=1 << 60, groups_outstanding=10**12),
}


@pytest.mark.parametrize("rows", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize(("blocks", "running"), [(True, True), (False, False)])
def test_the_picture_fits_a_small_terminal(tmp_path, rows, blocks, running):
    events = [event("a long tale " * 40, "warning"), event("with\nbreaks and \x1b[31m escapes")] * 20
    folder = a_run(tmp_path / "run", rows, steps=10_000_000, events=events, name="n" * 200)
    story = Story(folder)
    story.run.running = running
    text = shown(story, blocks=blocks)
    assert_fits(text)
    assert len(text.splitlines()) == 23, "events fill what is left"
    assert "\x1b" not in text
    assert blocks or text.isascii() or set(text) - set(map(chr, range(128))) <= set("╭─╮│╰╯")
    for width, height in ((200, 60), (40, 12), (20, 5)):
        wide = shown(story, width, height, blocks=blocks)
        assert_fits(wide, width, height)


def test_what_a_step_says(tmp_path):
    versions = {0: 8, 1: 9, 2: 9}
    skipped = {"tokens_masked": {"stale": 12, "not_sampled": 3}, "replica_versions": versions}
    rows = rows_to(10, **skipped, eval_reward_mean=0.625)
    rows.append({**rows_to(10, 10, **skipped)[0], "eval_reward_mean": None})
    rows[-1]["sync_seconds"], rows[-1]["sync_canary_logprob_abs_diff"] = {"total": 0.0973, "pause": 0.01}, 4.8e-7
    folder = a_run(tmp_path / "run", rows, events=[event("old"), event("look out", "warning", worker=3)])
    with driven(folder):
        text = shown_of(folder)
    for part in (
        "async_rl · demo",
        "running",
        "step 10 of 100",
        " 10%",
        "last 0:07 ago",
        "90% busy",
        "75% busy",
        "efficiency 0.90",
        "0.4 ",
        "0.625",
        "1.0e-08  staleness 0",
        "1.0e-02  staleness 1 and more",
        "on one log scale, 1.0e-08 to 1.0e-02",
        "mean 0.80   max 2   masked 15 tokens   clipped 5.0%",
        "50% of trajectories, up to 3 segments",
        "6 groups, 2.9 MiB   24 outstanding",
        "0.097 s   canary 4.8e-07",
        "policy 9   replica 0: 8 (1 behind)   replicas 1 2: 9",
        "0:40 ago     old",
        "0:40 ago     WARNING look out worker=3",
    ):
        assert part in text, part
    assert text.index("look out") > text.index("old"), "the newest is last"


def test_each_of_eight_replicas_is_told_of(tmp_path):
    rows = rows_to(9_999_999, 9_999_999, replica_versions={i: 9_999_998 - i for i in range(8)})
    text = shown_of(a_run(tmp_path / "run", rows, steps=10_000_000))
    for replica in range(1, 8):
        assert f"replica {replica}: {9_999_998 - replica} ({replica} behind)" in text
    assert "replica 0: 9999998 " in text


def test_missing_values_are_dashes(tmp_path):
    text = shown_of(a_run(tmp_path / "run", [NULLS]))
    for part in ("step - of", "- busy", "efficiency -", "mean -   max -   masked - tokens   clipped -", "canary -"):
        assert part in text, part
    assert "None" not in text
    assert "nan" not in text


def test_time_left_is_at_the_recent_pace(tmp_path):
    slow = rows_to(50)
    fast = [{**row, "elapsed_s": 150.0 + 2 * (row["step"] - 50)} for row in rows_to(50 + RECENT, 51)]
    with driven(folder := a_run(tmp_path / "run", slow + fast)):
        assert "   1:00 left" in shown_of(folder)
    with driven(folder := a_run(tmp_path / "one", rows_to(1), steps=3)):
        assert "   0:04 left" in shown_of(folder), "of one step its own time is all there is"


def test_pace_and_utilization_forget_old_steps(tmp_path):
    rows = rows_to(5, rollout_idle_ratio=1.0) + rows_to(5 + RECENT, 6, rollout_idle_ratio=0.5)
    assert " 50% busy" in shown_of(a_run(tmp_path / "run", rows))


def test_how_the_run_is(tmp_path):
    def first_line(name, rows, **more):
        return shown_of(a_run(tmp_path / name, rows, **more)).splitlines()[1].strip("│ ")

    assert first_line("finished", rows_to(3), summary={"exit_reason": "finished"}) == "finished"
    assert first_line("interrupted", rows_to(3), summary={"exit_reason": "interrupted"}) == "interrupted"
    assert first_line("failed", [], summary={"exit_reason": "EngineDied: gone"}) == "failed: EngineDied: gone"
    assert first_line("killed", rows_to(3)).startswith("stopped without a summary: killed")
    assert first_line("early", []).startswith("stopped before its first step")
    with driven(folder := a_run(tmp_path / "new", [])):
        assert "starting" in shown_of(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "logs" / "pipeline.jsonl").unlink()
    with driven(folder):
        assert "starting" in shown_of(folder)


def test_a_long_reason_is_read_over_several_lines(tmp_path):
    text = shown_of(a_run(tmp_path / "run", rows_to(3), summary={"exit_reason": "word " * 30 + "finally"}))
    assert_fits(text)
    assert "finally" in text


def test_it_follows_a_run_that_grows_and_one_that_goes_back(tmp_path):
    folder = a_run(tmp_path / "run", rows_to(30, reward_mean=0.9))
    story = Story(folder)
    story.refresh()
    assert "step 30 of" in shown(story)
    write_lines(folder / "metrics.jsonl", rows_to(32, 31, reward_mean=0.1), "a")
    write_lines(folder / "logs" / "pipeline.jsonl", [event("grown")], "a")
    story.refresh()
    text = shown(story)
    assert "step 32 of" in text
    assert "avg 0.1 to 0.9" in text
    assert "grown" in text
    assert len(story.reward.means(1000)) == 32, "no row is taken twice"

    shorter = folder / "shorter"
    write_lines(shorter, rows_to(10, reward_mean=0.5))
    shorter.replace(folder / "metrics.jsonl")
    story.refresh()
    text = shown(story)
    assert "step 10 of" in text
    assert "avg 0.5 to 0.5" in text, "nothing stays of the steps that are undone"

    write_lines(shorter, [])
    shorter.replace(folder / "metrics.jsonl")
    story.refresh()
    assert "step" not in shown(story).splitlines()[2]


def test_only_what_is_shown_is_kept(tmp_path):
    folder = a_run(tmp_path / "run", rows_to(300), events=[event("x")] * 500)
    story = Story(folder)
    story.refresh()
    assert not story.run.rows
    assert len(story.run.events) <= 200
    curve = Curve()
    for step in range(100_000):
        curve.add(float(step))
    means = curve.means(10_000)
    assert 256 <= len(means) <= 512
    assert means == sorted(means)
    assert means[0] < 200
    assert means[-1] > 99_800
    assert curve.means(1) == [pytest.approx(49_999.5)]


def test_a_curve_has_gaps_where_nothing_was_measured():
    curve = Curve()
    for value in (1.0, None, 3.0):
        curve.add(value)
    assert curve.means(10) == [1.0, None, 3.0]
    assert curve.last == 3.0
    assert Curve().means(10) == []


def test_curves_rise_and_grow_with_the_terminal(tmp_path):
    rows = [{**row, "reward_mean": row["step"] / 400} for row in rows_to(400)]
    for row in rows[::100]:
        row["eval_reward_mean"] = row["reward_mean"]
    story = Story(a_run(tmp_path / "run", rows))

    def curve(label, width, **options):
        line = next(line for line in shown(story, width, **options).splitlines() if label in line)
        return line.partition(label)[2].split()[0]

    narrow, wide = curve("reward", 80), curve("reward", 160)
    assert list(narrow) == sorted(narrow)
    assert narrow[0] == "▁"
    assert narrow[-1] == "█"
    assert len(wide) == len(narrow) + 80
    assert curve("reward", 80, blocks=False)[::30] == "_#"
    assert curve("eval", 80) == "▁▃▆█", "one evaluation next to the other"
    # One scale for both.
    assert set(curve("kl on-policy", 80)) == {"▁"}
    assert set(curve("kl stale", 80)) == {"█"}


def test_evaluation_sets_have_lines_of_their_own(tmp_path):
    rows = rows_to(4)
    for row, value in zip(rows[::2], (0.25, 0.5), strict=True):
        row["eval_avg"] = {"a-name-of-many-letters": value, "b": 0.125, "c": 0.0, "d": 0.0}
    lines = shown_of(a_run(tmp_path / "run", rows), height=40).splitlines()
    (named,) = [line for line in lines if "a-name-of-ma " in line]
    assert ("▁█" in named, "0.5 " in named) == (True, True)
    assert [any(f" {name}  " in line for line in lines) for name in "bcd"] == [True, True, False]


def test_kl_of_either_sign_and_zero(tmp_path):
    rows = rows_to(4)
    for row, kl in zip(rows, (-1e-3, 0.0, 1e-8, -1e-8), strict=True):
        row["ppo_kl_by_staleness"] = {"0": kl, "1": -1e-4, "3": 3e-4}
        row["token_staleness"] = {"0": 10, "1": 10, "3": 30}
    text = shown_of(a_run(tmp_path / "run", rows))
    assert " █▁▁▁ " in text, "the size counts; 0 is below all"
    assert "-1.0e-08  staleness 0" in text
    assert " 2.0e-04  staleness 1 and more" in text, "weighted with the tokens"


def test_without_a_terminal_it_prints_once_and_plain(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    folder = a_run(tmp_path / "run", rows_to(5), events=[event("\x1b[31mred", "error")])
    stream = io.StringIO()
    with driven(folder):
        assert watch(folder, stream=stream) == 0
    assert_fits(stream.getvalue())
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().count("step 5 of 100") == 1
    assert "ERROR" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_ascii_where_the_encoding_has_no_blocks(tmp_path, encoding):
    folder = a_run(tmp_path / "run", rows_to(5), events=[event("Übung → 你好"), event("long " * 50)], name="näme")
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert watch(folder, stream=stream) == 0
    stream.seek(0)
    text = stream.read()
    assert text.isascii()
    assert_fits(text)
    assert "###" in text


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder"):
        watch(tmp_path / "missing", stream=io.StringIO())


class Terminal:
    """A pseudo-terminal, and all that was written to it."""

    def __init__(self):
        self._master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.text = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # Linux, when the other side is closed
                return
            self.text += part.decode(errors="replace")

    def close(self):
        self.stream.close()
        self._reader.join()
        os.close(self._master)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    if not made.stream.closed:
        made.close()


ENTER, LEAVE, HIDE, SHOW = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h"


def assert_given_back(text):
    assert text.count(ENTER) == text.count(LEAVE) == 1
    assert text.count(HIDE) == text.count(SHOW) == 1
    return text.rpartition(LEAVE)[2]


def test_it_ends_with_the_run_and_leaves_the_last_picture(tmp_path, terminal, monkeypatch):
    folder = a_run(tmp_path / "run", rows_to(5))
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            write_lines(folder / "metrics.jsonl", rows_to(6, 6), "a")
        if len(naps) == 3:
            (folder / "summary.json").write_text('{"exit_reason": "finished"}')

    monkeypatch.setattr(time, "sleep", nap)
    with driven(folder):
        assert watch(folder, stream=terminal.stream, period_s=0.25) == 0
    terminal.close()
    assert naps == [0.25] * 3
    last = assert_given_back(terminal.text)
    assert "finished" in last
    assert "step 6 of 100" in last
    assert "step 5 of 100" in terminal.text
    assert "step 5 of 100" not in last


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunFolderError])
def test_the_terminal_is_given_back(tmp_path, terminal, monkeypatch, error):
    def stop(seconds):
        raise error

    folder = a_run(tmp_path / "run", rows_to(5))
    monkeypatch.setattr(time, "sleep", stop)
    with driven(folder):
        if error is KeyboardInterrupt:
            assert watch(folder, stream=terminal.stream) == 0
        else:
            with pytest.raises(RunFolderError):
                watch(folder, stream=terminal.stream)
    terminal.close()
    last = assert_given_back(terminal.text)
    assert ("step 5 of 100" in last) == (error is KeyboardInterrupt)


def test_once_on_a_terminal(tmp_path, terminal, monkeypatch):
    folder = a_run(tmp_path / "run", rows_to(5), events=[event("careful", "warning")])
    with driven(folder):
        assert watch(folder, once=True, stream=terminal.stream) == 0
        terminal.stream.write("@")
        monkeypatch.setenv("NO_COLOR", "1")
        assert watch(folder, once=True, stream=terminal.stream) == 0
    terminal.close()
    coloured, _, without = terminal.text.partition("@")
    assert ENTER not in terminal.text
    assert "\x1b[33mWARNING careful" in coloured
    assert "\x1b[33m" not in without
    assert "\x1b[36m" not in without
    assert "WARNING careful" in without
