"""The live view: a table on a terminal that is given back whatever happens, plain lines elsewhere."""

import io
import os
import pty
import re
import sys
import threading

import pytest

from async_rl.metrics.live import LiveView, step_line, time_left
from async_rl.metrics.records import SyncRecord
from tests.support.step_records import step_record

SYNC = SyncRecord(policy_version=7, seconds=0.061, canary=2e-7)
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Terminal(io.StringIO):
    """A stream that says it is a terminal and keeps what is written."""

    def isatty(self):
        return True

    def screen(self) -> str:
        """The text without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


def test_without_a_terminal_one_flushed_line_per_step():
    class Flushed(io.StringIO):
        on_disk = ""

        def flush(self):
            self.on_disk = self.getvalue()

    stream = Flushed()
    with LiveView("demo", 10, stream) as view:
        view.event("engines are up")
        view.sync(SYNC)
        view.update(step_record(step=3, eval_reward_mean=0.5))
        assert len(stream.on_disk.splitlines()) == 2
    first, second = stream.getvalue().splitlines()
    assert first == 'event="engines are up"'
    fields = dict(word.split("=", 1) for word in second.split())
    assert fields["event"] == "step"
    assert fields["step"] == "3/10"
    assert fields["reward"] == "0.400"
    assert fields["eval"] == "0.500"
    assert fields["kl_on_policy"] == "1.0e-08"
    assert fields["kl_stale"] == "1.0e-02"
    assert fields["partial"] == "0.50"
    assert fields["sync_s"] == "0.061"
    assert fields["rollout_busy"] == "0.90"
    assert "\x1b" not in stream.getvalue()


def test_what_does_not_exist_is_left_out_of_the_line():
    stream = io.StringIO()
    with LiveView("demo", 10, stream) as view:
        view.update(step_record(agreement_by_staleness={}))
    assert "eval=" not in stream.getvalue()
    assert "kl_" not in stream.getvalue()
    assert "sync_s=" not in stream.getvalue()


def test_on_a_terminal_one_table_says_it_all(terminal):
    with LiveView("demo", 10, terminal) as view:
        view.evaluated(0.31)
        view.sync(SYNC)
        view.update(step_record(step=3, reward_mean=0.2))
        view.update(step_record(step=4, eval_reward_mean=0.5))
        view.event("checkpoint_written", step=4, seconds=1.2)
    last = terminal.screen().rpartition("async_rl")[2]
    for part in (
        "step 4 of 10",
        "0:03 left",
        "0.400  (first 0.200)",
        "0.310  0.500",
        "on-policy 1.0e-08",
        "stale 1.0e-02",
        "mean 0.80   max 2",
        "50% of trajectories, up to 3 segments",
        "6 groups, 2.9 MiB   24 outstanding",
        "rollout 90%   trainer 75%",
        "version 7 in 0.061 s   canary 2.0e-07",
        "wrote the checkpoint of step 4 in 1.2 s",
    ):
        assert part in last


def test_table_fits_80_by_24(terminal):
    view = LiveView("a-rather-long-name-for-a-run-that-somebody-chose", 1_000_000, terminal)
    view.sync(SYNC)
    view.update(step_record(step=999_999, elapsed_s=1e7, queue_bytes=2**40))
    view.event("x" * 300)
    view.close()
    last = terminal.screen().rpartition("╭")[2]
    assert max(len(line.rstrip("\r")) for line in last.splitlines()) <= 80
    assert len(last.splitlines()) <= 24


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_terminal_is_given_back_on_exceptions(terminal, error):
    out, err = sys.stdout, sys.stderr

    def use():
        with LiveView("demo", 10, terminal) as view:
            view.update(step_record())
            assert terminal.getvalue().rfind(HIDE_CURSOR) > terminal.getvalue().rfind(SHOW_CURSOR)
            raise error

    with pytest.raises(error):
        use()
    assert terminal.getvalue().rfind(SHOW_CURSOR) > terminal.getvalue().rfind(HIDE_CURSOR)
    assert (sys.stdout, sys.stderr) == (out, err)


def test_closed_twice_and_used_after(terminal):
    view = LiveView("demo", 10, terminal)
    view.close()
    view.close()
    view.event("late")
    assert terminal.getvalue().endswith("event=late\n")


def test_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with LiveView("demo", 10, terminal) as view:
        view.event("x")
    assert terminal.getvalue() == "event=x\n"


def test_log_lines_do_not_tear_the_table(terminal):
    with LiveView("demo", 10, terminal):
        sys.stderr.write("a warning\n")
    assert "a warning" in terminal.screen()


def test_real_terminal(monkeypatch):
    """A pseudo-terminal: the table is drawn with cursor movements, and the cursor shown again at the end."""
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    read: list[bytes] = []

    def reader():
        try:
            while chunk := os.read(master, 4096):
                read.append(chunk)
        except OSError:
            return  # the other side was closed

    thread = threading.Thread(target=reader)
    thread.start()
    with os.fdopen(slave, "w") as stream, LiveView("demo", 2, stream) as view:
        view.update(step_record())
    thread.join(timeout=10)
    os.close(master)
    text = b"".join(read).decode()
    assert "step 1 of 2" in text
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0


def test_time_left_follows_the_pace():
    assert time_left(step_record(step=10, elapsed_s=20.0), 40) == "1:00"
    assert time_left(step_record(step=10, elapsed_s=36_000.0), 20) == "10:00:00"
    assert time_left(step_record(step=40, elapsed_s=20.0), 40) == "0:00"


def test_a_step_without_trained_tokens_has_a_line():
    line = step_line(step_record(agreement_by_staleness={}, segments=()), 10, None)
    assert line["staleness"] == "0.00"
    assert line["kl_on_policy"] is None
