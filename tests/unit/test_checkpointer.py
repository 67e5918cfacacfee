"""Checkpointer against scripted parts: what a moment of the run holds, and which version a restored run has."""

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from async_rl.config.loading import validate
from async_rl.driver import checkpoint, checkpoint_folder, queued_groups, run_state
from async_rl.driver.checkpoint import Checkpointer
from async_rl.driver.run_state import RunState
from async_rl.errors import CheckpointDamaged, CheckpointError, ReplicaFailed, TrainerDied
from async_rl.rollout.moments import SavedGroup
from async_rl.runtime import manifest
from async_rl.weights.canary import Noise

CONFIG = validate({"model": {"path": "m"}, "data": {"train": "t"}})


class Member:
    """A worker with one group in flight, which it writes in ``seconds``, or does not."""

    def __init__(self, replica, seconds=0.0, error=None):
        self.replica, self.seconds, self.error, self.frozen = replica, seconds, error, None

    async def freeze(self, step):
        self.frozen = step

    async def write_in_flight(self, step, folder):
        assert self.frozen == step
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rollout-{self.replica}-000000"
        return {f"of {self.replica}": SavedGroup(name, manifest.write_file(folder / name, b"group"))}


class Parts:
    """Everything that a Checkpointer calls, and the order in which it did."""

    def __init__(self, version=0, newest=0, in_flight=(), members=2, folder=None):
        self.members = {replica: Member(replica) for replica in range(members)}
        self.calls, self.checkpoints = [], folder
        # Of which the last is still being started: it has no weights, and cannot take groups.
        self.workers, self.fails, self.version, self.newest = {0: None, 1: None, 2: None}, [], version, newest
        self.copied, self.may_end, self.trainer_error = asyncio.Event(), asyncio.Event(), None
        self.in_flight = in_flight
        self.reported = []
        self.canary = SimpleNamespace(noise=None)

    # queue
    def hold(self, group_id, payload):
        self.calls.append(f"hold {group_id}: {payload[0]}")

    async def recover(self, step):
        return self.newest

    async def adopt(self, worker, groups):
        self.calls.append(f"{worker} has {sorted(groups)}")
        return list(groups)

    async def worker_lost(self, worker, keep=()):
        self.calls.append(f"{worker} is lost")

    async def stats(self):
        return SimpleNamespace(version=self.version, in_flight={"rollout-7": 1}, queued_groups=1)

    async def advance(self, version):
        self.calls.append(f"advance {version}")

    async def state(self):
        return {"queued": [[["a", 1], 0], [["acked meanwhile", 1], 0]], "leased": [[["b", 1], 0], [["in redis", 1], 0]]}

    def payload(self, group_id):
        return {"a": ["reference"], "b": ["lost"], "in redis": "1-0"}.get(group_id)

    # sync
    async def run(self, version):
        self.calls.append(f"sync {version}")

    async def resume(self):
        self.calls.append("resume")

    async def while_paused(self, paused):
        if self.fails:
            raise self.fails.pop()
        await asyncio.gather(*(paused(replica) for replica in self.members))

    async def on(self, replica, call):
        return await call(self.members[replica])

    # trainer: it writes until ``may_end``
    async def begin_save(self, folder):
        self.calls.append("copied")
        self.folder = folder
        self.copied.set()

    async def is_saved(self):
        if self.trainer_error is not None:
            raise self.trainer_error
        return self.may_end.is_set()

    async def finish_save(self):
        names = ("rank 0", "rank 1")
        return [{name: manifest.write_file(self.folder / name, name.encode())} for name in names]

    async def checkpointed(self, oldest_step):
        self.calls.append(f"queue may forget up to {oldest_step}")

    # replicas
    async def hand_over(self, replica, groups):
        return list(groups)

    def evict(self, error):
        self.calls.append(f"evict {error.replica}")
        del self.members[error.replica]

    # monitor, recorder
    @contextlib.contextmanager
    def phase(self, name, step):
        self.calls.append(f"phase {name}")
        yield

    def event(self, event, **fields):
        self.reported.append((event, fields))


class Records:
    """The recorder; its ``checkpointed`` is another one than the queue's."""

    def __init__(self, parts):
        self.parts, self.checkpoints, self.event = parts, parts.checkpoints, parts.event
        self.scores = {}

    def state(self):
        return {"rows": len(self.parts.reported)}

    def eval_scores(self):
        return self.scores

    def checkpointed(self, step, seconds):
        self.parts.calls.append(f"checkpoint of {step}")


def checkpointer(parts):
    names = ("queue", "rollouts", "trainers", "sync", "replicas", "monitor", "recorder")
    return Checkpointer(CONFIG, **dict.fromkeys(names, parts) | {"recorder": Records(parts)})


def saved(monkeypatch, **fields):
    """A checkpoint after step 6 at version 5."""
    files = {group: Path(group) for group in "abc"}
    defaults = {"queue": {}, "recorder": {}, "queued": {"q": Path("000000")}, "in_flight": files}
    state = RunState(**({"step": 6, "version": 5, "synced": True} | defaults | fields))

    async def load(files, workers):
        return {group: f"message of {path}" for group, path in files.items() if len(workers) == 2}

    monkeypatch.setattr(run_state, "read", lambda _: state)
    monkeypatch.setattr(queued_groups, "load", load)


@pytest.mark.parametrize(
    ("synced", "queue", "newest", "version"),
    [
        (True, 5, 0, 5),  # the weights of the checkpoint are those of its version
        (False, 5, 0, 6),  # they are newer: a step without a weight sync
        (True, 8, 0, 9),  # a queue that outlived the run has seen versions whose weights are lost
        (True, 5, 7, 8),
    ],
)
async def test_a_version_never_stands_for_two_weights(monkeypatch, synced, queue, newest, version):
    saved(monkeypatch, synced=synced)
    parts = Parts(version=queue, newest=newest)
    assert await checkpointer(parts).restore(Path("unused")) == version
    assert f"sync {version}" in parts.calls
    assert (f"advance {version}" in parts.calls) == (version > queue)
    assert parts.calls[-1] == "resume"


async def test_the_canarys_calibration_is_that_of_the_run_and_not_of_its_restore(monkeypatch):
    """The engines of a restored run have other weights than its trainer until the first sync."""
    parts = Parts(version=5)
    parts.canary.noise = Noise("bfloat16", 0.7, 0.08)
    taken = (await checkpointer(parts).take(6, 5, synced=True)).state
    parts.canary.noise = None
    noise_at_sync = []

    async def run(version):
        noise_at_sync.append(parts.canary.noise)

    parts.run = run
    saved(monkeypatch, canary=taken.canary)
    await checkpointer(parts).restore(Path("unused"))
    assert noise_at_sync == [Noise("bfloat16", 0.7, 0.08)]


async def test_groups_in_flight_are_spread_over_the_replicas_before_other_workers_are_given_up(monkeypatch):
    saved(monkeypatch)
    parts = Parts(version=5)
    await checkpointer(parts).restore(Path("unused"))
    assert parts.calls[:4] == [
        "hold q: message of 000000",
        "rollout-0 has ['a', 'c']",
        "rollout-1 has ['b']",
        "rollout-7 is lost",
    ]
    assert parts.reported == [("work_restored", {"step": 6, "queued": 1, "resumed": 3})]


async def test_a_replica_that_fails_is_evicted_and_the_moment_taken_without_it():
    parts = Parts()
    parts.fails = [ReplicaFailed(1, "it hangs")]
    moment = await checkpointer(parts).pause_and_take(6, 5, synced=False)
    assert parts.calls == ["phase checkpoint", "evict 1"]
    assert (moment.state.step, moment.state.version, moment.state.synced) == (6, 5, False)
    assert parts.members[0].frozen == 6
    assert moment.queued == {"a": ["reference"], "b": ["lost"]}, "not what has ended, or is in Redis"


async def written_elsewhere(folder, payloads, *, everywhere):
    """Stand for ``queued_groups.write``: one host has all messages but one."""
    assert everywhere, "the hosts have the run folder"
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for group_id, (reference,) in payloads.items():
        if reference != "lost":
            saved[group_id] = SavedGroup(group_id, manifest.write_file(folder / group_id, reference.encode()))
    return saved


async def begun(parts, monkeypatch, step=6):
    """A checkpoint that is being written, while training continues."""
    monkeypatch.setattr(checkpoint, "_POLL_S", 0.001)
    monkeypatch.setattr(queued_groups, "write", written_elsewhere)
    subject = checkpointer(parts)
    await subject.write(await subject.pause_and_take(step, 5, synced=False))
    return subject


async def test_training_continues_while_a_checkpoint_is_written_which_counts_once_all_is_there(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    subject = await begun(parts, monkeypatch)
    assert parts.calls[-1] == "copied"
    await asyncio.sleep(0.02)
    assert checkpoint_folder.latest_valid(tmp_path) is None, "the trainer's files are not there yet"
    parts.may_end.set()
    await subject.finish()
    assert parts.calls[-2:] == ["queue may forget up to 6", "checkpoint of 6"]
    found = await subject.latest()
    assert manifest.find_altered(found, manifest.read(found)) is None
    state = run_state.read(found)
    assert (state.step, state.recorder) == (6, {"rows": 0})
    assert {group: path.read_bytes() for group, path in state.queued.items()} == {"a": b"reference"}
    assert {group: path.read_bytes() for group, path in state.in_flight.items()} == {"of 0": b"group", "of 1": b"group"}
    assert set(manifest.read(found)) == {
        str(path.relative_to(found)) for path in found.rglob("*") if path.is_file() and path.name != manifest.NAME
    }


async def test_the_driver_reads_nothing_of_a_checkpoint_that_it_makes(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    read = []
    monkeypatch.setattr(manifest, "checksum", lambda path: read.append(path))
    monkeypatch.setattr(Path, "read_bytes", read.append)
    subject = await begun(parts, monkeypatch)
    parts.may_end.set()
    await subject.finish()
    assert parts.calls[-1] == "checkpoint of 6"
    assert read == []


async def test_all_workers_write_at_once_and_the_engines_do_not_wait_for_it(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path, members=64)
    for member in parts.members.values():
        member.seconds = 0.2
    parts.may_end.set()
    before = time.monotonic()
    subject = await begun(parts, monkeypatch)
    paused = time.monotonic() - before
    await subject.finish()
    took = time.monotonic() - before
    assert paused < 0.2
    assert 0.2 <= took < 64 * 0.2 / 4, "the slowest, not the sum"
    assert len(run_state.read(await subject.latest()).in_flight) == 64


async def test_a_worker_that_cannot_write_is_named_and_costs_only_its_groups(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path, members=3)
    parts.members[1].error = OSError(28, "No space left on device", "rollout-1-000000")
    parts.may_end.set()
    with capture_logs() as logged:
        subject = await begun(parts, monkeypatch)
        await subject.finish()
    (line,) = [line for line in logged if line["event"] == "in_flight_not_saved"]
    assert (line["worker"], line["step"]) == ("rollout-1", 6)
    assert line["reason"].startswith("[Errno 28] No space left on device")
    assert set(run_state.read(await subject.latest()).in_flight) == {"of 0", "of 2"}


async def test_a_worker_that_was_replaced_since_the_moment_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(queued_groups, "write", written_elsewhere)
    parts = Parts(folder=tmp_path)
    parts.may_end.set()
    subject = checkpointer(parts)
    moment = await subject.pause_and_take(6, 5, synced=False)
    parts.members[1] = Member(1)
    await subject.write(moment)
    await subject.finish()
    assert set(run_state.read(await subject.latest()).in_flight) == {"of 0"}


async def test_a_trainer_that_dies_while_it_writes_leaves_the_checkpoint_before_as_the_newest(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    parts.may_end.set()
    subject = await begun(parts, monkeypatch, step=4)
    await subject.finish()
    parts.may_end.clear()
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    parts.trainer_error = TrainerDied("trainer rank 1 died during is_saved")
    assert (await subject.latest()).name == "step-000004"
    parts.trainer_error = None
    parts.may_end.set()
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    await subject.finish()
    assert (await subject.latest()).name == "step-000006"
    assert not list(tmp_path.glob("*.partial"))


async def test_one_checkpoint_is_written_at_a_time_and_a_fault_ends_the_run(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    subject = await begun(parts, monkeypatch, step=4)
    watching = asyncio.create_task(subject.watch())
    following = asyncio.create_task(subject.write(await subject.pause_and_take(6, 5, synced=False)))
    await asyncio.sleep(0.02)
    assert not following.done()
    parts.trainer_error = CheckpointError("trainer rank 0: No space left on device")
    for task in (watching, following):
        with pytest.raises(CheckpointError, match="No space left"):
            await asyncio.wait_for(task, 5)


async def test_a_checkpoint_that_was_found_damaged_at_load_is_passed_over(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    parts.may_end.set()
    subject = await begun(parts, monkeypatch, step=4)
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    newest = await subject.latest()
    assert newest.name == "step-000006"
    subject.pass_over(CheckpointDamaged(str(newest), "weights has another checksum than when it was written"))
    assert (await subject.latest()).name == "step-000004"
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    assert await subject.latest() == newest, "it was written again"


async def test_a_checkpoint_waits_for_the_groups_of_one_that_was_given_up(tmp_path, monkeypatch):
    """Both would write files of one name."""
    parts = Parts(folder=tmp_path)
    parts.trainer_error = TrainerDied("trainer rank 1 died during is_saved")
    may_write, writing = asyncio.Event(), []

    async def slowly(folder, payloads, **where):
        writing.append(folder)
        await may_write.wait()
        return await written_elsewhere(folder, payloads, **where)

    monkeypatch.setattr(checkpoint, "_POLL_S", 0.001)
    monkeypatch.setattr(queued_groups, "write", slowly)
    subject = checkpointer(parts)
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    await subject.finish()
    parts.trainer_error = None
    parts.may_end.set()
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    await asyncio.sleep(0.01)
    assert len(writing) == 1
    may_write.set()
    await subject.finish()
    assert len(writing) == 2
    assert set(run_state.read(await subject.latest()).queued) == {"a"}
