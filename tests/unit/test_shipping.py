"""Logs, timelines and targets of another host, read in byte ranges and added to the run folder: no line twice."""

import json
import logging
import os
import random
import resource
from pathlib import Path

import pytest

from async_rl.metrics.timeline import Timeline
from async_rl.runtime import logs
from async_rl.runtime.arrivals import SHIPPED, Arrivals
from async_rl.runtime.shipping import Piece, Position, Shipment, read

LOG = "logs/rollout-0.jsonl"
MOST = 2**20


class Hosts:
    """A run folder, and the spool of one other host by its address."""

    def __init__(self, folder: Path) -> None:
        self.run, self._folder = folder / "runs" / "run", folder
        self.run.mkdir(parents=True)
        self.arrivals = Arrivals(self.run, timeline_bytes=2_000)

    def spool(self, host: str = "b") -> Path:
        path = self._folder / host
        (path / "logs").mkdir(parents=True, exist_ok=True)
        return path

    def write(self, text: str, host: str = "b", stream: str = LOG) -> Path:
        path = self.spool(host) / stream
        with path.open("a") as file:
            file.write(text)
        return path

    def ship(self, host: str = "b", *, most: int = MOST, ended: bool = False) -> list[str]:
        """Bring all that is there. Returns the streams with something missing."""
        missing = []
        while True:
            shipment = read(self.spool(host), self.arrivals.positions(host), most=most, ended=ended)
            missing += self.arrivals.take(host, shipment)
            if not shipment.more:
                return missing

    def text(self, stream: str = LOG) -> str:
        return "".join(path.read_text() for path in logs.files(self.run / stream))


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path)


def test_only_what_was_added_is_sent(hosts):
    hosts.write("one\ntwo\n")
    assert hosts.ship() == []
    assert read(hosts.spool(), hosts.arrivals.positions("b"), most=MOST).pieces == []
    hosts.write("three\n")
    (piece,) = read(hosts.spool(), hosts.arrivals.positions("b"), most=MOST).pieces
    assert piece.data == b"three\n"
    hosts.ship()
    assert hosts.text() == "one\ntwo\nthree\n"


def test_a_line_is_sent_once_it_is_whole_or_will_never_be(hosts):
    hosts.write("whole\nhalf of")
    hosts.ship()
    assert hosts.text() == "whole\n"
    hosts.write(" one\nand a")
    hosts.ship()
    assert hosts.text() == "whole\nhalf of one\n"
    hosts.ship(ended=True)  # its writer was killed
    assert hosts.text() == "whole\nhalf of one\nand a\n"


@pytest.mark.parametrize("most", [7, 64, MOST])
def test_answers_are_bounded_and_cut_between_lines(hosts, most):
    lines = [f"{number}:{'x' * (number % 5)}\n" for number in range(200)]
    lines.insert(100, "y" * 500 + "\n")  # longer than an answer: then a line is cut
    hosts.write("".join(lines))
    hosts.write("other\n", stream="logs/trainer-0.libs.log")
    first = read(hosts.spool(), {}, most=most)
    assert sum(len(piece.data) for piece in first.pieces) <= most
    assert first.pieces[0].data.endswith(b"\n")
    hosts.ship(most=most)
    assert hosts.text() == "".join(lines)
    assert hosts.text("logs/trainer-0.libs.log") == "other\n"


def test_an_answer_that_is_lost_or_comes_twice_changes_nothing(hosts):
    hosts.write("one\n")
    lost = read(hosts.spool(), {}, most=MOST)
    assert lost.pieces
    hosts.write("two\n")
    again = read(hosts.spool(), hosts.arrivals.positions("b"), most=MOST)
    hosts.arrivals.take("b", again)
    hosts.arrivals.take("b", again)
    assert hosts.text() == "one\ntwo\n"


def test_files_that_are_rolled_meanwhile_are_read_to_their_end(hosts, monkeypatch):
    """The writer is the real one, and rolls often; a reader that is a few files behind misses nothing."""
    monkeypatch.setattr(logs, "MAX_BYTES", 400)
    handler = logs._rotating(hosts.spool() / LOG)
    handler.setFormatter(logging.Formatter("%(message)s"))
    monkeypatch.setattr(logs, "MAX_BYTES", 10**6)
    hosts.arrivals = Arrivals(hosts.run, timeline_bytes=0)
    written = []
    random.seed(0)
    for _ in range(60):
        for _ in range(random.randrange(12)):
            written.append(f"line {len(written):06}")
            handler.emit(logging.makeLogRecord({"msg": written[-1]}))
        assert hosts.ship(most=random.choice([50, 300, MOST])) == []
    handler.close()
    assert hosts.text().splitlines() == written
    assert len(written) > 300
    assert len(list((hosts.spool() / "logs").iterdir())) == 4


def test_what_is_removed_before_it_is_read_is_a_gap(hosts):
    path = hosts.write("one\n")
    hosts.ship()
    kept = os.open(path, os.O_RDONLY)  # so that its inode is not taken again
    hosts.write("never read\n")
    path.unlink()
    hosts.write("after\n")
    assert hosts.ship() == [LOG]
    assert hosts.text() == "one\nafter\n"
    assert hosts.ship() == []
    os.close(kept)


def test_a_file_that_shrank_is_read_from_its_beginning(hosts):
    path = hosts.write("one\ntwo\n")
    hosts.ship()
    path.write_text("new\n")
    assert hosts.ship() == [LOG]
    assert hosts.text() == "one\ntwo\nnew\n"


def test_another_file_with_the_inode_of_one_that_is_gone_is_read_from_its_beginning(hosts):
    """As on a host that was restarted: its temporary files are gone, and the numbers of inodes begin again."""
    path = hosts.write("1999-12-31 one\n")
    hosts.ship()
    path.write_text("2000-01-01 two\n2000-01-01 three\n")
    assert hosts.ship() == [LOG]
    assert hosts.text() == "1999-12-31 one\n2000-01-01 two\n2000-01-01 three\n"
    hosts.write("x" * 10_000 + "\n")  # the same file, which grew beyond what is compared
    assert hosts.ship() == []


def test_a_worker_that_moves_to_another_host_continues_its_log(hosts):
    hosts.write("on b\n")
    hosts.ship("b")
    hosts.write("on c\n", host="c")
    hosts.ship("c")
    hosts.write("on b again\n")
    hosts.ship("b")
    assert hosts.text() == "on b\non c\non b again\n"


def test_another_start_continues_where_the_one_before_was_killed(hosts):
    hosts.write("one\n")
    hosts.ship()
    hosts.write("two\n")
    hosts.arrivals = Arrivals(hosts.run, timeline_bytes=0)
    hosts.ship()
    assert hosts.text() == "one\ntwo\n"
    hosts.arrivals.forget("b")
    hosts.arrivals.save()
    assert json.loads((hosts.run / SHIPPED).read_text()) == {}
    (hosts.run / SHIPPED).write_text("{")
    assert Arrivals(hosts.run, timeline_bytes=0).positions("b") == {}


def test_the_files_of_the_run_folder_are_rolled_and_bounded(hosts, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 1_000)
    hosts.arrivals = Arrivals(hosts.run, timeline_bytes=2_000)
    timeline = Timeline(hosts.spool(), "rollout-0", 10**6)
    for number in range(400):
        hosts.write(f"line {number:06}\n")
        timeline.add("call", 0.0, number=number)
        if number % 7 == 0:
            hosts.ship()
    timeline.close()
    hosts.ship()
    found = {path.name: path.stat().st_size for path in (hosts.run / "logs").iterdir()}
    assert sorted(found) == ["rollout-0.1.jsonl", "rollout-0.2.jsonl", "rollout-0.3.jsonl", "rollout-0.jsonl"]
    assert max(found.values()) <= 1_000
    assert [int(line[5:]) for line in hosts.text().splitlines()] == list(range(400))[-len(hosts.text()) // 12 :]
    spans = hosts.run / "timeline"
    assert sorted(path.name for path in spans.iterdir()) == ["rollout-0.1.jsonl", "rollout-0.jsonl"]
    assert json.loads((spans / "rollout-0.jsonl").read_text().splitlines()[-1])["number"] == 399


def test_a_full_disk_costs_no_line_and_adds_none_twice(hosts):
    """The run folder's disk takes a part, then nothing, then all again."""
    hosts.write("one\ntwo\nthree\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))  # so the kernel takes no more of a file
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                hosts.ship()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert hosts.text() == "one\ntw"
    hosts.ship()
    assert hosts.text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("stream", ["logs/../x", "config.yaml", "checkpoints/a", "logs/a/b", "/etc/passwd"])
def test_no_other_file_of_the_run_folder_is_written(hosts, stream):
    with pytest.raises(ValueError, match="is no stream of a run folder"):
        hosts.arrivals.take("b", Shipment([Piece(stream, b"x\n", Position(1, 2, 0, 0), False)], False, {}))


def target(address: str) -> bytes:
    return json.dumps([{"targets": [address]}]).encode()


def test_targets_appear_in_both_folders_and_vanish_with_their_host(hosts):
    files = hosts.run / "prometheus" / "targets" / "rollout-1.json", hosts.run.parent / ".prometheus/rollout-1@run.json"
    here = hosts.spool() / "prometheus" / "targets"
    here.mkdir(parents=True)
    (here / "rollout-1.json").write_bytes(target("10.0.0.2:1"))
    hosts.ship()
    assert [file.read_bytes() for file in files] == [target("10.0.0.2:1")] * 2
    (here / "rollout-1.json").unlink()  # the process ended
    hosts.ship()
    assert not any(file.exists() for file in files)
    (here / "rollout-1.json").write_bytes(target("10.0.0.2:3"))
    hosts.ship()
    files[0].write_bytes(target("10.0.0.3:1"))  # it moved to a host that is faster to announce it
    hosts.arrivals.withdraw("b")
    assert files[0].read_bytes() == target("10.0.0.3:1")
    assert not files[1].exists()
