"""Checkpoints, restores and exports where only the driver's host has the run folder: who is asked for what, and when.

The courier is a stand-in; tests/unit/test_courier.py has the real one, tests/cluster real hosts.
"""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from async_rl.config.loading import validate
from async_rl.driver import checkpoint, checkpoint_folder, queued_groups, remote_files, run_state
from async_rl.driver.actors import TrainerRanks
from async_rl.driver.courier import Collected
from async_rl.driver.remote_files import RemoteFiles
from async_rl.errors import CheckpointDamaged, CheckpointError, TrainerDied
from async_rl.rollout import actor as rollout_actor
from async_rl.runtime import manifest, spool
from async_rl.trainer.actor import TrainerActor
from async_rl.trainer.worker import TrainerWorker
from tests.unit.test_checkpointer import Parts, checkpointer, saved

BASE = {"model": {"path": "m"}, "data": {"train": "t"}}
SPOOLED = {"cluster": {"address": "10.0.0.1:6379", "shared_fs": False, "run_host": "10.0.0.1"}}


class Calls:
    """The courier's actor: notes calls in order; answers what a test says."""

    def __init__(self, calls, **answers):
        self.calls, self.answers = calls, answers

    def __getattr__(self, method):
        async def answer(value):
            if isinstance(value, Exception):
                raise value
            return value

        def remote(*arguments):
            self.calls.append((method, *arguments))
            return answer(self.answers.get(method))

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


def files(calls, **answers):
    made = RemoteFiles(validate(BASE | SPOOLED))
    made._actor = Calls(calls, **answers)
    return made


async def test_where_all_hosts_have_the_run_folder_no_process_is_asked():
    here = RemoteFiles(validate(BASE))
    await here.clear()
    await here.collect(Path("/runs/run/checkpoints/final"))
    assert await here.complete(Path("/runs/run/checkpoints/step-000001.partial"), {}) == []
    await here.deliver(Path("/runs/run/checkpoints/step-000001"), None)
    with remote_files.courier(validate(BASE)):
        pass  # no Ray


async def test_missing_files_are_lost_with_a_host_or_are_a_fault_of_which_the_checkpoint_says_more():
    partial = Path("/runs/run/checkpoints/step-000001.partial")
    assert await files([], collect=Collected([], ["10.0.0.2"])).complete(partial, {}) == []
    with capture_logs() as logged:
        assert await files([], collect=Collected(["a"], ["10.0.0.2"])).complete(partial, {}) == ["a"]
    assert [(line["event"], line["hosts"]) for line in logged] == [("checkpoint_files_lost", "10.0.0.2")]
    assert await files([], collect=Collected(["a"], [])).complete(partial, {}) == []
    with pytest.raises(CheckpointError, match="disk"):
        await files([], collect=CheckpointError("disk")).complete(partial, {})


# -- written ------------------------------------------------------------------------------------------------------


async def begun(parts, monkeypatch, collected):
    """A checkpoint whose parts are on other hosts, except for what the stand-ins write."""

    async def written_here(folder, references, *, everywhere):
        parts.calls.append(f"queued groups written everywhere: {everywhere}")
        return {}

    monkeypatch.setattr(checkpoint, "_POLL_S", 0.001)
    monkeypatch.setattr(queued_groups, "write", written_here)
    subject = checkpointer(parts)
    subject._remote = files(parts.calls, collect=collected)
    parts.may_end.set()
    await subject.write(await subject.pause_and_take(6, 5, synced=False))
    return subject


async def test_a_checkpoint_counts_once_the_files_of_other_hosts_are_here(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    subject = await begun(parts, monkeypatch, Collected([], []))
    await subject.finish()
    partial = tmp_path / "step-000006.partial"
    order = [call if isinstance(call, str) else call[0] for call in parts.calls]
    assert order.index("clear") < order.index("copied"), "an attempt that was given up"
    assert order.index("collect") < order.index("checkpoint of 6")
    assert "queued groups written everywhere: False" in order
    (asked,) = [call for call in parts.calls if call[0] == "collect"]
    assert asked[1] == partial
    names = {"rank 0", "rank 1", "pipeline/in_flight/rollout-0-000000", "pipeline/in_flight/rollout-1-000000"}
    assert set(asked[2]) == names


async def test_groups_in_flight_that_are_lost_with_their_host_are_left_out(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    lost = Collected(["pipeline/in_flight/rollout-1-000000"], ["10.0.0.2"])
    subject = await begun(parts, monkeypatch, lost)
    await subject.finish()
    found = await subject.latest()
    assert set(run_state.read(found).in_flight) == {"of 0"}
    assert "pipeline/in_flight/rollout-1-000000" not in manifest.read(found)


async def test_files_of_the_trainer_that_are_lost_are_no_checkpoint_and_no_failure_of_the_run(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    with capture_logs() as logged:
        subject = await begun(parts, monkeypatch, Collected(["rank 1"], ["10.0.0.2"]))
        await subject.finish()
    (line,) = [line for line in logged if line["event"] == "checkpoint_given_up"]
    assert line["reason"] == "1 files of the trainer were lost with the host that wrote them: rank 1"
    assert checkpoint_folder.latest_valid(tmp_path) is None


async def test_a_full_disk_of_the_driver_s_host_ends_the_run(tmp_path, monkeypatch):
    parts = Parts(folder=tmp_path)
    subject = await begun(parts, monkeypatch, CheckpointError("no room"))
    with pytest.raises(CheckpointError, match="no room"):
        await asyncio.wait_for(subject.watch(), 10)


# -- restored -----------------------------------------------------------------------------------------------------


async def test_groups_of_a_checkpoint_are_read_where_they_are_and_adopted_by_reference(monkeypatch):
    parts = Parts(version=5)
    saved(monkeypatch)
    subject = checkpointer(parts)
    subject._remote = files(parts.calls)

    async def load(found, readers):
        assert readers == [subject._remote]
        return {group: f"message of {path}" for group, path in found.items() if group != "b"}  # which is damaged

    adopted, kept = {}, []
    hand_over, worker_lost = parts.hand_over, parts.worker_lost

    async def noted(replica, groups):
        adopted.update(groups)
        return await hand_over(replica, groups)

    async def lost(worker, keep=()):
        kept.append(list(keep))
        await worker_lost(worker, keep)

    parts.hand_over, parts.worker_lost = noted, lost
    monkeypatch.setattr(queued_groups, "load", load)
    await subject.restore(Path("unused"))
    assert adopted == {"a": "message of a", "c": "message of c"}, "no file: no host has it"
    assert kept == [["a", "c"]], "the group that was not read is issued again"


class Rank:
    def __init__(self, calls, address):
        async def answer(method, *arguments):
            calls.append((method, *arguments))
            return address if method == "address" else None

        for method in ("address", "start", "export", "open_store"):
            remote = SimpleNamespace(remote=lambda *arguments, method=method: answer(method, *arguments))
            setattr(self, method, remote)


def ranks(calls, **answers):
    made = TrainerRanks(validate(BASE | SPOOLED), None)
    made._ranks = [Rank(calls, f"10.0.0.{number}") for number in (1, 2, 2)]
    made._remote = files(calls, **answers)
    return made


async def test_the_hosts_of_the_ranks_have_a_checkpoint_before_they_load_it_and_not_afterwards():
    calls = []
    await ranks(calls).start(Path("/runs/run/checkpoints/step-000006"))
    names = [call[0] for call in calls]
    assert names == ["address"] * 3 + ["deliver"] + ["open_store"] * 3 + ["start"] * 3 + ["clear"]
    assert calls[3][2] == ["10.0.0.1", "10.0.0.2"]
    calls.clear()
    await ranks(calls).start()
    assert {call[0] for call in calls} == {"open_store", "start"}


@pytest.mark.parametrize(
    ("answer", "error"),
    [("10.0.0.2", TrainerDied), (CheckpointDamaged("/runs/run/checkpoints/step-000006", "x"), CheckpointDamaged)],
)
async def test_ranks_do_not_load_a_checkpoint_that_is_damaged_or_not_there(answer, error):
    calls = []
    with pytest.raises(error):
        await ranks(calls, deliver=answer).start(Path("/runs/run/checkpoints/step-000006"))
    assert "start" not in [call[0] for call in calls]


async def test_an_exported_model_comes_to_the_run_folder():
    calls, folder = [], Path("/runs/run/checkpoints/final")
    await ranks(calls).export(folder)
    assert calls == [("export", folder)] * 3 + [("collect", folder)]


# -- in the processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path):
    cluster = SPOOLED["cluster"] | {"local_dir": str(tmp_path / "disk")}
    return spool.on_host(validate(BASE | {"runs": str(tmp_path / "runs"), "cluster": cluster}), "10.0.0.2")


def test_a_rank_reads_and_writes_in_its_spool_and_names_the_run_folder(paths, monkeypatch):
    calls = []
    for method in ("start", "begin_save", "export"):
        monkeypatch.setattr(TrainerWorker, method, lambda _, *arguments: calls.append(arguments))
    rank = object.__new__(TrainerActor)
    rank._paths = paths
    there, here = paths.run_dir / "checkpoints", paths.config.run_dir / "checkpoints"
    rank.start(there / "step-000006", "store")
    rank.start(None, None)
    rank.begin_save(there / "step-000008.partial")
    rank.export(there / "final")
    assert calls == [(here / "step-000006", "store"), (None, None), (here / "step-000008.partial",), (here / "final",)]
    assert (here / "step-000008.partial").is_dir()

    def damaged(*_):
        raise CheckpointDamaged(str(here / "step-000006"), "x")

    monkeypatch.setattr(TrainerWorker, "start", damaged)
    with pytest.raises(CheckpointDamaged) as caught:
        rank.start(there / "step-000006", "store")
    assert caught.value.path == str(there / "step-000006"), "by which the driver passes over it"


async def test_a_worker_writes_its_groups_in_flight_to_its_spool(paths, monkeypatch):
    calls = []

    async def write(_, step, folder):
        calls.append((step, folder))
        return {}

    monkeypatch.setattr(rollout_actor.RolloutReplica, "write_in_flight", write)
    worker = object.__new__(rollout_actor.RolloutActor)
    worker._paths = paths
    await worker.write_in_flight(6, paths.run_dir / "checkpoints" / "step-000006.partial" / "pipeline" / "in_flight")
    assert calls == [(6, paths.config.run_dir / "checkpoints" / "step-000006.partial" / "pipeline" / "in_flight")]
