"""How often a process is restarted; what a checkpoint holds of the driver; sums that outlive a run."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from async_rl.config.loading import validate
from async_rl.config.operation import RecoverySection
from async_rl.driver import run_state
from async_rl.driver.restarts import Recovery, Restarts
from async_rl.driver.run_state import RunState
from async_rl.errors import CheckpointDamaged, CheckpointError, ConfigError, EngineDied, ProcessLost, TrainerDied
from async_rl.metrics.records import SyncRecord, Totals
from async_rl.metrics.summary import Summary
from async_rl.runtime import manifest
from tests.support.step_records import eval_results


def test_restarts_are_bounded_within_a_period_and_wait_longer_each_time():
    restarts = Restarts(RecoverySection(max_restarts=3, period_s=100.0, backoff_s=2.0))
    assert [restarts.next_delay("trainer", now) for now in (0.0, 10.0, 20.0)] == [2.0, 4.0, 8.0]
    assert restarts.next_delay("trainer", 30.0) is None
    assert restarts.next_delay("rollout-0", 30.0) == 2.0  # of its own
    assert restarts.next_delay("trainer", 101.0) == 8.0  # the first is forgotten
    assert restarts.next_delay("trainer", 102.0) is None


def test_no_restart_at_all():
    assert Restarts(RecoverySection(max_restarts=0)).next_delay("trainer", 0.0) is None


STATE = RunState(
    step=7,
    version=8,
    synced=True,
    queue={"version": 7, "queued": [["a", 1]]},
    recorder={"wall_s": 1.5, "staleness": {0: 3, 2: 1}},
    queued={"0-1.0": Path("000000"), "0-2.0": Path("000001")},
    in_flight={"0-3.1": Path("rollout-0-000000"), "0-4.0": Path("rollout-3-000000")},
    canary={"dtype": "float32", "token": 1e-5, "mean": 1e-6},
)


def write_state(folder, state=STATE):
    """What the driver writes of a checkpoint, and its manifest."""
    entries = run_state.write_head(folder, state)
    manifest.write(folder, entries)
    assert sorted(entries) == ["pipeline/state.msgpack"]
    assert manifest.find_altered(folder, entries) is None


def test_the_state_of_a_run_comes_back_as_it_was_written(tmp_path):
    write_state(tmp_path)
    state = run_state.read(tmp_path)
    assert (state.step, state.version, state.synced) == (7, 8, True)
    assert (state.queue, state.recorder) == (STATE.queue, STATE.recorder)
    top = tmp_path / "pipeline"
    assert state.queued == {"0-1.0": top / "queued" / "000000", "0-2.0": top / "queued" / "000001"}
    in_flight = top / "in_flight"
    assert state.in_flight == {"0-3.1": in_flight / "rollout-0-000000", "0-4.0": in_flight / "rollout-3-000000"}
    assert state.canary == STATE.canary


@pytest.mark.parametrize(
    "older",
    [
        {"format": 2, "queued": ["0-1.0", "0-2.0"]},
        {"format": 1, "queued": ["0-1.0", "0-2.0"], "in_flight": ["0-3.1", "0-4.0"], "canary": None},
    ],
    ids=["0.2", "0.1"],
)
def test_a_state_of_an_earlier_release_is_read(tmp_path, older):
    """Its finished groups, and in release 0.1 those in flight, are lists of ids, and their files numbered."""
    write_state(tmp_path)
    head = tmp_path / "pipeline" / "state.msgpack"
    fields = msgpack.unpackb(head.read_bytes(), strict_map_key=False) | older
    if older["format"] == 1:
        del fields["canary"]
    manifest.write(tmp_path, {"pipeline/state.msgpack": manifest.write_file(head, msgpack.packb(fields))})
    state, top = run_state.read(tmp_path), tmp_path / "pipeline"
    assert (state.step, state.canary) == (7, None if older["format"] == 1 else STATE.canary)
    assert state.queued == {"0-1.0": top / "queued" / "000000", "0-2.0": top / "queued" / "000001"}
    names = ["000000", "000001"] if older["format"] == 1 else ["rollout-0-000000", "rollout-3-000000"]
    assert list(state.in_flight.values()) == [top / "in_flight" / name for name in names]


def test_a_state_that_was_altered_is_refused_before_it_is_used(tmp_path):
    write_state(tmp_path)
    head = tmp_path / "pipeline" / "state.msgpack"
    head.write_bytes(head.read_bytes().replace(b"wall_s", b"walls_"))
    with pytest.raises(CheckpointDamaged, match=r"state.msgpack has another checksum"):
        run_state.read(tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda top: (top / "state.msgpack").unlink(), "holds no driver state"),
        (lambda top: (top / "state.msgpack").write_bytes(b"\xc1"), "cannot be read"),
        (lambda top: (top / "state.msgpack").write_bytes(msgpack.packb([1])), "cannot be read"),
        (lambda top: (top / "state.msgpack").write_bytes(msgpack.packb({"format": 99})), "has format 99"),
    ],
)
def test_a_state_that_is_no_state_is_refused(tmp_path, damage, says):
    write_state(tmp_path)
    damage(tmp_path / "pipeline")
    head = tmp_path / "pipeline" / "state.msgpack"
    manifest.write(tmp_path, manifest.entries_of(tmp_path, ["pipeline/state.msgpack"] if head.exists() else []))
    with pytest.raises(CheckpointError, match=says):
        run_state.read(tmp_path)


def test_the_summary_is_restored_from_its_state():
    whole, first, second = Summary(), Summary(), Summary()
    syncs = [
        SyncRecord(policy_version=v, seconds=v / 7, canary=v * 1e-6, retries={"transfer": v % 2}) for v in range(1, 9)
    ]
    for number, sync in enumerate(syncs):
        whole.add_sync(sync)
        whole.add_eval(eval_results(number / 10, problems=8))
        (first if number < 3 else second).add_sync(sync)
        if number == 2:
            first.add_eval(eval_results(0.0, problems=8))
            second.restore(msgpack.unpackb(msgpack.packb(first.state()), strict_map_key=False))
    second.add_eval(eval_results(0.7, problems=8))
    totals = Totals(wall_s=1.0, setup_s=1.0)
    assert second.result(totals, "finished") == whole.result(totals, "finished")


def test_a_process_writes_its_stacks_whatever_it_is_at(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from async_rl.runtime.process import dump_stacks_to\n"
        "dump_stacks_to(Path(sys.argv[1]))\nprint('ready', flush=True)\n"
        "def deep_in_something(): time.sleep(3600)\ndeep_in_something()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "stacks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while "deep_in_something" not in ((tmp_path / "stacks").read_text() if (tmp_path / "stacks").exists() else ""):
            os.kill(process.pid, signal.SIGUSR1)
            asyncio.run(asyncio.sleep(0.05))
        assert process.poll() is None
        process.kill()


class Records:
    def __init__(self):
        self.lost, self.events = [], []

    def replicas(self, counts):
        if counts["lost"] != (self.lost or [0])[-1]:
            self.lost.append(counts["lost"])

    def restarted(self, process):
        pass

    def event(self, event, **fields):
        self.events.append(event)


def recovery(tmp_path, *, replicas, abort_s=1800.0, **settings):
    tree = {
        "runs": str(tmp_path),
        "model": {"path": "m"},
        "data": {"train": "d"},
        "rollout": {"replicas": replicas},
        "recovery": {"max_restarts": 1, "backoff_s": 0.0, **settings},
        "watchdog": {"stall_s": min(60.0, abort_s), "abort_s": abort_s},
    }
    records = Records()
    subject = Recovery(validate(tree), records)
    if isinstance(replicas, int):
        for replica in range(replicas):
            subject.moved(f"rollout-{replica}", "working")
    return subject, records


async def test_a_run_continues_without_replicas_while_enough_are_left(tmp_path):
    subject, records = recovery(tmp_path, replicas=3, min_replicas=2, period_s=3600.0)
    for replica in range(3):
        await subject.wait(f"rollout-{replica}", EngineDied("its GPU fell off the bus"))
    lost = asyncio.ensure_future(subject.wait("rollout-1", EngineDied("its GPU fell off the bus")))
    await asyncio.sleep(0.01)
    assert not lost.done()
    assert records.lost == [1]
    with pytest.raises(ProcessLost, match=r"rollout-2 died again after 1 restarts.*its GPU fell off the bus"):
        await subject.wait("rollout-2", EngineDied("its GPU fell off the bus"))
    lost.cancel()


async def test_a_lost_replica_is_tried_again_when_its_restarts_are_forgotten(tmp_path):
    subject, records = recovery(tmp_path, replicas=2, period_s=0.05)
    await subject.wait("rollout-0", EngineDied("no memory"))
    await subject.wait("rollout-0", EngineDied("no memory"))
    assert records.lost == [1, 0]
    assert records.events == ["process_died", "replica_lost", "process_died"]


async def test_a_run_never_continues_without_its_trainer(tmp_path):
    subject, _ = recovery(tmp_path, replicas=8)
    await subject.wait("trainer", TrainerDied("no memory"))
    with pytest.raises(ProcessLost, match="trainer died again"):
        await subject.wait("trainer", TrainerDied("no memory"))


ELASTIC = {"min": 2, "max": 5}


async def test_replicas_without_a_host_are_none_that_a_run_could_continue_with(tmp_path):
    subject, _ = recovery(tmp_path, replicas=ELASTIC)
    for replica in range(2):
        subject.moved(f"rollout-{replica}", "working")
    await subject.wait("rollout-0", EngineDied("no memory"))
    with pytest.raises(ProcessLost, match=r"rollout-0 died again after 1 restarts"):
        await subject.wait("rollout-0", EngineDied("no memory"))


async def test_a_run_fails_when_too_few_replicas_have_had_a_host_for_too_long(tmp_path):
    subject, records = recovery(tmp_path, replicas=ELASTIC, abort_s=0.05)
    for replica in range(3):
        subject.moved(f"rollout-{replica}", "working")
    watching = asyncio.ensure_future(subject.watch())
    await asyncio.sleep(0.1)
    subject.moved("rollout-2", "waiting")
    await asyncio.sleep(0.1)
    assert records.events == [], "two are enough"
    subject.moved("rollout-1", "waiting")
    await asyncio.sleep(0.02)
    assert records.events == ["replicas_short"]
    subject.moved("rollout-4", "starting")
    await asyncio.sleep(0.1)
    assert not watching.done(), "its host came in time"
    subject.moved("rollout-0", "waiting")
    with pytest.raises(ProcessLost, match=r"needs 2 replicas .*abort_s = 0\.05 s it had a host for 1"):
        await asyncio.wait_for(watching, 5)
    assert records.events == ["replicas_short"] * 2


async def test_a_fixed_number_of_replicas_has_no_such_limit(tmp_path):
    subject, records = recovery(tmp_path, replicas=2, abort_s=0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(subject.watch(), 0.1)
    assert records.events == []


def needed(**sections):
    return validate({"model": {"path": "m"}, "data": {"train": "d"}} | sections).needed_replicas


def test_a_run_cannot_need_more_replicas_than_it_starts_with():
    with pytest.raises(ConfigError, match=r"recovery\.min_replicas is 3, but rollout\.replicas is 2; set it to 2"):
        needed(rollout={"replicas": 2}, recovery={"min_replicas": 3})
    with pytest.raises(ConfigError, match=r"recovery\.min_replicas is 3, but rollout\.replicas\.min is 2; set it to 2"):
        needed(rollout={"replicas": ELASTIC}, recovery={"min_replicas": 3})


def test_a_run_needs_the_replicas_that_it_starts_with_unless_set_otherwise():
    assert needed(rollout={"replicas": 4}) == 1
    assert needed(rollout={"replicas": ELASTIC}) == 2
    assert needed(rollout={"replicas": ELASTIC}, recovery={"min_replicas": 1}) == 1
