"""The queue rebuilt from its journal, wherever it died: against a twin that never does."""

import base64
import copy
import functools
import os
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_rl.errors import QueueError
from async_rl.queue import actor as queue_actor
from async_rl.queue.actor import QueueActor
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings
from async_rl.queue.journal import FileJournal
from async_rl.queue.records import GroupMeta
from tests.support.examples import examples
from tests.support.full_disk import room_for
from tests.support.queue_parts import Source, begin_journal, make_broker
from tests.support.simulation import cursor


class Crash(Exception):
    """The process ends here."""


class CrashingJournal(FileJournal):
    """Ends the process before or after the next event is written down, or in the middle of it."""

    crash = None

    def append(self, event):
        how, CrashingJournal.crash = CrashingJournal.crash, None
        if how == "before":
            raise Crash
        super().append(event)
        if how == "torn":
            os.ftruncate(self._file, self.size() - 3)
        if how is not None:
            raise Crash


def broker():
    settings = BrokerSettings(
        required_groups=2,
        window_limit=5,
        max_staleness=1,
        on_stale="drop",
        max_bytes=1000,
        max_attempts=2,
        can_rewind=True,
    )
    return Broker(cursor(12), settings)


def decide(actor, call, method, *arguments):
    """Have an actor's broker decide by the name that the journal has."""
    return actor._decide(call, getattr(actor._broker, method), *arguments)


class QueueMachine(RuleBasedStateMachine):
    """Calls with ids, made again after a crash as Ray makes them; the twin hears each once."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.open = begin_journal(Path(self.folder.name) / "journal", broker(), CrashingJournal)
        self.subject, self.twin = QueueActor(broker(), self.open), QueueActor(broker())
        self.calls = self.version = self.step = 0
        self.running, self.queued, self.leased = [], [], []
        CrashingJournal.crash = None

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def call(self, method, *arguments, crash=None):
        """The answer; after a crash the actor is another one, and the call is made again."""
        self.calls += 1
        name = f"client/{self.calls}"
        CrashingJournal.crash = crash
        try:
            answer = decide(self.subject, name, method, *arguments)
        except Crash:
            self.restart()
            answer = decide(self.subject, name, method, *arguments)
        CrashingJournal.crash = None
        assert answer == decide(self.twin, name, method, *arguments)
        # Answered, and yet made again: the answer was on its way when the connection broke.
        assert answer == decide(self.subject, name, method, *arguments)
        self.look()
        return answer

    def look(self):
        state = self.twin._broker.state()
        self.running = [fields[0] for fields in state["running"]]
        self.queued = [fields[0] for fields, _ in state["queued"]]
        self.leased = [fields[0] for fields, _ in state["leased"]]

    @rule()
    def restart(self):
        self.subject._journal.close()
        self.subject = QueueActor(broker(), self.open)

    crashes = st.sampled_from([None, None, "before", "torn", "after"])

    @rule(worker=st.sampled_from("ab"), n=st.integers(1, 4), crash=crashes)
    def issue(self, worker, n, crash):
        if self.twin._broker.free_slots:
            self.call("issue", worker, n, crash=crash)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), nbytes=st.integers(1, 300), crash=crashes)
    def put(self, data, nbytes, crash):
        meta = GroupMeta(data.draw(st.sampled_from(self.running)), 9, nbytes, self.version, self.version, 2, 0, (4, 5))
        if not self.twin._broker.full_for(nbytes):
            self.call("put", meta, crash=crash)

    @precondition(lambda self: self.queued)
    @rule(data=st.data(), crash=crashes)
    def lease(self, data, crash):
        self.call("lease", data.draw(st.integers(1, min(5, len(self.queued)))), "trainer", 1, crash=crash)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), method=st.sampled_from(["ack", "release"]), crash=crashes)
    def end_lease(self, data, method, crash):
        chosen = data.draw(st.lists(st.sampled_from(self.leased), unique=True, min_size=1))
        self.step += 1
        self.call(method, chosen, *([self.step] if method == "ack" else []), crash=crash)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), rest_epochs=st.integers(0, 2), crash=crashes)
    def filter_group(self, data, rest_epochs, crash):
        self.call("filter_group", data.draw(st.sampled_from(self.running)), "function", rest_epochs, crash=crash)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), method=st.sampled_from(["return_group", "fail"]), crash=crashes)
    def give_up(self, data, method, crash):
        reason = data.draw(st.sampled_from(["timeout", "reward"]))
        self.call(method, data.draw(st.sampled_from(self.running)), reason, crash=crash)

    @rule(crash=crashes)
    def advance(self, crash):
        self.version += 1
        self.call("advance", self.version, crash=crash)

    @rule(worker=st.sampled_from("ab"), crash=crashes)
    def worker_lost(self, worker, crash):
        self.call("worker_lost", worker, self.running[:1], crash=crash)

    @rule(back=st.integers(0, 2), crash=crashes)
    def rewind(self, back, crash):
        self.step = max(0, self.step - back)
        self.call("rewind", self.step, crash=crash)

    @rule()
    def compact(self):
        answers = list(self.subject._answers.items())
        self.subject._journal.compact(["", "restore", [self.subject._broker.state(), answers]])

    @invariant()
    def both_are_the_same(self):
        if hasattr(self, "subject"):
            assert self.subject._broker.state() == self.twin._broker.state()
            assert self.subject._broker.counts().add_up


QueueMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
test_invariant_5_wherever_the_queue_dies = QueueMachine.TestCase


def test_a_journal_that_is_damaged_in_the_middle_is_refused(tmp_path):
    journal = FileJournal(tmp_path / "journal", create=True)
    for version in (1, 2, 3):
        journal.append([str(version), "advance", [version]])
    data = bytearray((tmp_path / "journal").read_bytes())
    data[10] ^= 1
    (tmp_path / "journal").write_bytes(data)
    with pytest.raises(QueueError, match="damaged at byte 0"):
        list(journal.replay())


def test_an_event_that_the_disk_has_no_room_for_leaves_the_journal_as_it_was(tmp_path):
    path = tmp_path / "journal"
    journal = FileJournal(path, create=True)
    events = [["a", "issue", ["w", 1]], ["b", "issue", ["w", 2]]]
    journal.append(events[0])
    before = path.read_bytes()
    with room_for(len(before) + 5):
        with pytest.raises(QueueError, match=rf"{path}: File too large after 5 of the \d+ bytes .* has \d+ bytes free"):
            journal.append(events[1])
        with pytest.raises(QueueError, match=rf"{path}\.tmp: File too large after"):
            journal.compact(["", "restore", ["x" * len(before) * 2, []]])
    assert path.read_bytes() == before
    assert journal.size() == len(before)
    assert list(tmp_path.iterdir()) == [path]
    journal.append(events[1])  # there is room again
    assert list(FileJournal(path).replay()) == events


def test_a_queue_that_could_not_write_a_decision_makes_no_more_of_them(tmp_path):
    path = tmp_path / "journal"
    actor = QueueActor(broker(), begin_journal(path, broker()))
    (answered,) = decide(actor, "a", "issue", "w", 1)
    with room_for(path.stat().st_size + 5), pytest.raises(QueueError, match=r"bytes free; make room there"):
        decide(actor, "b", "issue", "w", 1)
    with pytest.raises(QueueError, match=r"makes no more: .*journal: File too large"):
        decide(actor, "c", "fail", answered, "reward")
    assert decide(actor, "a", "issue", "w", 1) == [answered]  # what is on record can be repeated
    again = QueueActor(broker(), functools.partial(FileJournal, path))
    assert [fields[0] for fields in again._broker.state()["running"]] == [answered]


def test_a_queue_that_starts_again_without_its_journal_does_not_begin_the_run_again(tmp_path):
    path = tmp_path / "journal"
    open_journal = begin_journal(path, broker())
    first = QueueActor(broker(), open_journal)
    decide(first, "a", "issue", "w", 3)
    again = QueueActor(broker(), open_journal)
    assert again._broker.counts().issued == 3

    written = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(QueueError, match=rf"{path}: the queue's journal is empty, .* --resume auto"):
        QueueActor(broker(), open_journal)
    path.write_bytes(written[:20])  # as empty: a torn first frame
    with pytest.raises(QueueError, match="the queue's journal is empty"):
        QueueActor(broker(), open_journal)
    path.unlink()
    with pytest.raises(QueueError, match=rf"{path}: the queue's journal is missing, .* --resume auto"):
        QueueActor(broker(), open_journal)
    assert not path.exists()  # so that the next try is refused, too


def test_a_journal_begins_with_the_state_of_a_checkpoint_and_is_begun_once(tmp_path):
    before = broker()
    before.issue("w", 3)
    restored = broker()
    restored.restore(before.state())
    open_journal = begin_journal(tmp_path / "journal", restored)
    actor = QueueActor(broker(), open_journal)
    assert actor._broker.state() == before.state()
    decide(actor, "a", "issue", "w", 1)
    begin_journal(tmp_path / "journal", restored)  # where the journal outlived the run
    assert QueueActor(broker(), open_journal)._broker.counts().issued == 4


class CountedJournal(FileJournal):
    """Notes the size of the journal before and after each compaction."""

    def __init__(self, path):
        super().__init__(path)
        self.compactions = []

    def compact(self, event):
        before = self.size()
        super().compact(event)
        self.compactions.append((before, self.size()))


@pytest.mark.parametrize("compacted", [(), (0,), (1,), (0, 1)])
async def test_a_lost_worker_stays_lost_when_the_queue_is_rebuilt(tmp_path, compacted):
    """From the calls, and from a journal that was compacted before or after the loss."""
    open_journal = begin_journal(tmp_path / "journal", make_broker())
    first = QueueActor(make_broker(), open_journal)
    for number, decide_it in enumerate((first.take("old/0", "w", 1), first.worker_lost("driver/0", "w"))):
        await decide_it
        if number in compacted:
            first._compact(first._journal)
    await first.take("new/0", "w", 1)
    second = QueueActor(make_broker(), open_journal)
    assert await second.take("old/1", "w", 1) == []
    assert len(await second.take("new/1", "w", 1)) == 1
    await second.worker_lost("driver/1", "w")
    assert await QueueActor(make_broker(), open_journal).take("new/2", "w", 1) == []


def test_a_state_larger_than_the_limit_is_not_written_again_at_each_decision(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_actor, "_COMPACT_BYTES", 2_000)
    monkeypatch.setattr(queue_actor, "_REMEMBERED", 2)

    open_journal = begin_journal(tmp_path / "journal", make_broker(window_limit=200), CountedJournal)

    def start():
        return QueueActor(make_broker(window_limit=200), open_journal)

    def decide_often(actor, name):
        for call in range(500):
            decide(actor, f"{name}/{call}", "adopt", "w", ["0-1.0"])

    first = start()
    decide(first, "issue", "issue", "w", 200)
    decide_often(first, "first")
    (grown, state), *later = first._journal.compactions
    assert 2_000 < grown < state  # the limit was reached, and the state alone is larger
    assert later
    for before, after in later:
        assert before > 2 * state
        assert after == pytest.approx(state, rel=0.1)
    # The next process does not know how much of its journal is the state: it compacts, and the same holds again.
    second = start()
    decide_often(second, "second")
    (_, again), *later = second._journal.compactions
    assert again == pytest.approx(state, rel=0.1)
    assert later
    assert all(before > 2 * state for before, _ in later)


def test_a_journal_is_compacted_at_the_limit_where_the_state_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_actor, "_COMPACT_BYTES", 2_000)
    monkeypatch.setattr(queue_actor, "_REMEMBERED", 2)
    actor = QueueActor(make_broker(), begin_journal(tmp_path / "journal", make_broker(), CountedJournal))
    for version in range(1, 300):
        decide(actor, str(version), "advance", version)
        assert actor._journal.size() <= 2_000
    assert all(after < 1_000 for _, after in actor._journal.compactions)
    assert len(actor._journal.compactions) < 10


OLD_JOURNAL = (
    "c-mEwze`*}5Xbj~V3H;ff+0l$`2#%PoxdWftWpFEtCWxRz13Upxx3EpdfJHKACPx<m822Q_uk1}BX&VTP)Lz9sRB0I22$84V&{yC#%6Yy?`L<u"
    "Gy9b>=DzQrx3>xq)@cx}&&9F;E45+;c%`ITNb@Bxyol305!~Y0<<5yk<Lvs5SgCPuorn+m7)>Z`sEtquxwICqu)+bC3X|R2B$O&_NEPb_>w<6|"
    "u(n>rppC&KpXV~6LQRsJ)ik%-LnJn~K{xD^4o23CBt$;pj;y6Gae}>MdbZt(MuP0RYikE|l4$RSgGaAWzC0TGL2{*IylZY|!EmJ<#7`M}%+f6a"
    ")&{zR1XS;U>O<i0@6UY#M(=>pdteBG57qZE0b|+qirNFWb3^Gl`TO{(PwIGwNA*_o#z5&USvx)JkuuT0*+sYj+M5;<W96W5a#7$I&k+1J`|Fs%"
    "$%4nrTt%W;dX43|ncpW=ewXoB8+Si>g}RKFgBRo;vVR0k^`n}I>PAb2AJ$}VQ2TT7C2w!zZh~GzLtQ|aX#3wg)$|IPFxVp"
)
"""What release 0.1.0 wrote, zlib and base 85: a journal with one call of each kind, when groups in flight were called
running in code. Journals and checkpoints of such runs must stay readable."""


def test_a_journal_of_an_earlier_release_rebuilds_the_same_broker(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(zlib.decompress(base64.b85decode(OLD_JOURNAL)))
    settings = {"window_limit": 6, "max_attempts": 2, "can_rewind": True}
    actor = QueueActor(make_broker(Source(9), **settings), lambda: FileJournal(path))
    old_meta = [100, 10, 0, 0, 8, 0, (), ""]
    # Rewards, lengths, segments, resume points, finish reasons and the parts of rewards came later; then metrics, ends,
    # trajectories, turns and repeated tokens of rollouts.
    unknown = [*[()] * (8 + 6), 0]
    expected = {
        "version": 1,
        "rules": 2,
        "running": [["0-5.0", "0-5", 0, [0, 0, 0], "rollout-1"]],
        "queued": [[["0-3.0", "0-3", 0, [0, 0, 0], "rollout-0"], ["0-3.0", *old_meta, *unknown]]],
        "leased": [[["0-2.0", "0-2", 0, [0, 0, 0], "rollout-0"], ["0-2.0", *old_meta, *unknown]]],
        "attempts": {"0-4": [1, 1, 0]},
        "exhausted": False,
        "step_is_open": False,
        "issued": 5,
        "trained": 1,
        "trained_in_window": 0,
        "returned": {"timeout": 1},
        "dropped": {},
        "failed": {},
        "filtered": {},  # since 0.2
        "history": [[1, "0-1", 0]],
        "source": {"rows": 9, "row": 5, "circulating": ["0-4"], "deferred": []},
    }
    assert actor._broker.state() == expected
    assert actor._broker.stats().in_flight == {"rollout-1": 1}
    checkpointed = copy.deepcopy(expected)  # what a checkpoint of that release holds
    for section in ("queued", "leased"):
        checkpointed[section][0][1] = checkpointed[section][0][1][: -len(unknown)]
    without_attempts(checkpointed)
    restored = make_broker(Source(9), **settings)
    restored.restore(checkpointed)
    QueueActor(restored)
    expected["attempts"]["0-4"] = [1, 0, 0]  # such a state does not say how they ended
    assert restored.state() == expected


def without_attempts(state):
    """Make a state what release 0.1 wrote: a prompt's groups are counted, whatever became of them."""
    del state["rules"], state["filtered"], state["source"]["deferred"]
    for fields in [*state["running"], *(fields for fields, _ in state["queued"] + state["leased"])]:
        fields[3] = fields[3][0]
    state["attempts"] = {prompt: issued for prompt, (issued, _, _) in state["attempts"].items()}


def test_a_journal_is_replayed_by_the_rules_that_it_was_written_under(tmp_path):
    """Release 0.1 gave a prompt up by its issues, and issued a stale one again at once; later calls rest on that."""
    path = tmp_path / "journal"
    state = make_broker(Source(9)).state()
    without_attempts(state)
    journal = FileJournal(path, create=True)
    calls = [
        ["issue", ["w", 1]],
        ["worker_lost", ["w", []]],
        ["issue", ["w", 1]],
        ["return_group", ["0-1.1", "timeout"]],  # the second issue: given up
        ["advance", [5]],
    ]
    for attempt in range(3):  # each time first in line
        calls += [["issue", ["w", 1]], ["put", [[f"0-2.{attempt}", 100, 10, 0, 0, 8, 0]]]]
    calls += [["issue", ["w", 2]]]
    journal.append(["", "restore", [state, []]])
    for number, (method, arguments) in enumerate(calls):
        journal.append([str(number), method, arguments])

    def start():
        return QueueActor(make_broker(Source(9), max_attempts=2, max_stale_drops=3), lambda: FileJournal(path))

    actor = start()
    assert [fields[0] for fields in actor._broker.state()["running"]] == ["0-2.3", "0-3.0"]
    assert actor._broker.stats().failed == {"timeout": 1}
    # From here on by the rules of today, also when the journal is replayed once more.
    decide(actor, "a", "put", GroupMeta("0-2.3", 100, 10, 0, 0, 8, 0))
    assert actor._broker.stats().failed == {"timeout": 1, "stale": 1}
    assert start()._broker.state() == actor._broker.state()
