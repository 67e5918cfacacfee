"""Files between the run folder and spools: whole, in chunks, checked, and what happens if a host or a disk fails.

Ray is a stand-in that calls at once and loses what a test says. tests/cluster has runs with the real one.
"""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from structlog.testing import capture_logs

from async_rl.config.loading import validate
from async_rl.driver import courier, host_watch
from async_rl.driver.courier import Courier
from async_rl.errors import CheckpointDamaged, CheckpointError, ResourceError
from async_rl.runtime import host_files, manifest, spool
from async_rl.runtime.host_files import HostFiles
from async_rl.runtime.manifest import FileEntry

HOME, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"
PARTIAL = "checkpoints/step-000020.partial"


class Lost:
    """A reference whose object is gone."""

    def __init__(self, error):
        self.error = error


class Actor:
    """Calls a host's files at once; the first calls of a method may be lost, or change what they return."""

    def __init__(self, files, net):
        self._files, self._net = files, net

    def __getattr__(self, method):
        def remote(*arguments, **named):
            self._net.calls.append((method, arguments))
            if self._net.faults.get(method):
                fault = self._net.faults[method].pop(0)
                if isinstance(fault, BaseException):
                    return Lost(fault)
                return fault(getattr(self._files, method)(*arguments, **named))
            try:
                return getattr(self._files, method)(*arguments, **named)
            except Exception as error:  # noqa: BLE001 - as Ray does
                return Lost(RayTaskError(method, "traceback", error))

        return SimpleNamespace(remote=remote)


class Net:
    """Ray, and the hosts of a run: the driver's, B and C, each with a disk of its own."""

    def __init__(self, folder: Path, monkeypatch):
        self.config = validate(
            {
                "model": {"path": "m"},
                "data": {"train": "t"},
                "runs": str(folder / "home"),
                "cluster": {
                    "address": f"{HOME}:6379",
                    "shared_fs": False,
                    "local_dir": str(folder / "disk"),
                    "run_host": HOME,
                },
            }
        )
        self.run = self.config.run_dir
        (self.run / "checkpoints").mkdir(parents=True)
        self.alive, self.faults, self.calls, self.puts = {B, C}, {}, [], []
        ray = SimpleNamespace(
            get=self._get,
            put=lambda value: self.puts.append(value.nbytes) or value,
            wait=lambda references, **_: (references, []),
            nodes=lambda: [{"Alive": True, "NodeID": address} for address in self.alive],
        )
        monkeypatch.setattr(courier, "ray", ray)
        monkeypatch.setattr(host_watch, "ray", ray)
        monkeypatch.setattr(courier, "_places", lambda: [(address, address) for address in (HOME, B, C)])
        monkeypatch.setattr(Courier, "_start", lambda _, address, __: Actor(HostFiles(self.config, address), self))
        self.courier = Courier(self.config)

    def _get(self, reference, timeout=None):
        if isinstance(reference, Lost):
            raise reference.error
        return reference

    def spool(self, host: str) -> Path:
        return spool.on_host(self.config, host).config.run_dir

    def written(self, host: str, name: str, content: bytes) -> dict[str, FileEntry]:
        path = self.spool(host) / PARTIAL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return {name: manifest.write_file(path, content)}


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.setattr(courier, "CHUNK_BYTES", 1000)
    return Net(tmp_path, monkeypatch)


def content(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def test_the_parts_of_a_checkpoint_come_from_every_host_in_chunks_and_leave_nothing_there(net):
    sizes = {"__0_0.distcp": 2500, "__1_0.distcp": 3000, "pipeline/in_flight/rollout-1-000000": 10, "empty": 0}
    entries = {}
    for number, (name, size) in enumerate(sizes.items()):
        entries |= net.written((B, C)[number % 2], name, content(number, size))
    here = net.run / PARTIAL
    here.mkdir()
    entries["here.already"] = manifest.write_file(here / "here.already", b"of a rank on the driver's host")
    assert net.courier.collect(here, entries) == ([], [])
    assert manifest.find_altered(here, entries) is None
    assert max(length for method, (_, _, length) in _calls(net, "chunk")) == 1000
    assert not any((net.spool(host) / "checkpoints").exists() for host in (B, C))


def _calls(net, wanted):
    return [(method, arguments) for method, arguments in net.calls if method == wanted]


def test_a_chunk_that_is_lost_or_damaged_is_asked_for_again(net):
    entries = net.written(B, "a", content(1, 2500))
    for fault in (ObjectLostError("0" * 56, None, ""), lambda chunk: chunk[:-1], lambda chunk: chunk ^ 1):
        net.faults["chunk"] = [fault]
        assert net.courier.collect(net.run / PARTIAL, entries) == ([], [])
        assert manifest.find_altered(net.run / PARTIAL, entries) is None
        (net.run / PARTIAL / "a").unlink()
        net.written(B, "a", content(1, 2500))


def test_a_file_that_is_not_as_it_was_written_is_an_error_that_names_host_file_and_setting(net):
    entries = net.written(B, "a", content(1, 2500))
    (net.spool(B) / PARTIAL / "a").write_bytes(content(2, 2500))
    with pytest.raises(CheckpointError, match=rf"a of {B} came with checksum .*cluster\.local_dir"):
        net.courier.collect(net.run / PARTIAL, entries)


def test_a_file_that_is_shorter_than_written_is_an_error(net):
    entries = net.written(B, "a", content(1, 2500))
    (net.spool(B) / PARTIAL / "a").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=rf"a cannot be read on {B}: OSError.*5 bytes from 0, and 1000"):
        net.courier.collect(net.run / PARTIAL, entries)


def test_a_full_disk_of_the_driver_s_host_is_an_error_that_names_the_setting(net, monkeypatch):
    class Full(manifest.ChecksummedFile):
        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(courier, "ChecksummedFile", Full)
    entries = net.written(B, "a", content(1, 2500))
    with pytest.raises(CheckpointError, match=rf"a of {B} cannot be written .*No space left on device.*`runs`"):
        net.courier.collect(net.run / PARTIAL, entries)


def test_files_of_a_host_that_is_gone_are_missing_and_the_others_come(net):
    net.courier._look()
    entries = net.written(B, "a", content(1, 1500)) | net.written(C, "b", content(2, 1500))
    net.alive.remove(C)
    assert net.courier.collect(net.run / PARTIAL, entries) == (["b"], [C])
    assert (net.run / PARTIAL / "a").read_bytes() == content(1, 1500)


def test_a_host_that_dies_while_its_file_comes_is_gone(net):
    entries = net.written(B, "a", content(1, 1500))
    net.faults["chunk"] = [ActorDiedError()] * 4
    net.courier._look()
    net.alive.remove(B)
    net.courier._look = lambda: None  # it is found out later
    assert net.courier.collect(net.run / PARTIAL, entries).missing == ["a"]


def test_a_file_that_no_host_has_is_missing_without_a_host_that_explains_it(net):
    assert net.courier.collect(net.run / PARTIAL, {"a": FileEntry(5, "0")}) == (["a"], [])


def test_a_folder_without_entries_comes_whole(net):
    """The exported model: its writer takes no checksums."""
    folder = net.spool(C) / "checkpoints" / "final"
    folder.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        (folder / name).write_bytes(content(number, 2001))
    net.courier.collect(net.run / "checkpoints" / "final")
    found = {path.name: path.read_bytes() for path in (net.run / "checkpoints" / "final").iterdir()}
    assert found == {"model.safetensors": content(0, 2001), "config.json": content(1, 2001)}


# -- the other way ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(net):
    path = net.run / "checkpoints" / "step-000020"
    (path / "pipeline" / "queued").mkdir(parents=True)
    entries = {
        name: manifest.write_file(path / name, content(number, 2500))
        for number, name in enumerate(("__0_0.distcp", "common.pt", "pipeline/queued/000000"))
    }
    entries["empty"] = manifest.write_file(path / "empty", b"")
    manifest.write(path, entries)
    return path


def test_a_checkpoint_that_is_restored_goes_to_the_hosts_of_the_ranks_alone(net, checkpoint):
    stale = net.spool(B) / "checkpoints" / "step-000020"
    stale.mkdir(parents=True)
    (stale / "common.pt").write_bytes(b"longer" * 1000)
    assert net.courier.deliver(checkpoint, [HOME, B]) is None
    assert sorted(path.name for path in stale.rglob("*")) == ["__0_0.distcp", "common.pt", "empty", "manifest.json"]
    assert manifest.find_altered(stale, manifest.read(stale)) is None
    assert len(manifest.read(stale)) == 3
    assert not (net.spool(C) / "checkpoints").exists()
    assert max(net.puts) == 1000


def test_each_chunk_is_put_once_for_all_hosts(net, checkpoint):
    assert net.courier.deliver(checkpoint, [B, C]) is None
    assert sum(net.puts) == 5000
    for host in (B, C):
        found = net.spool(host) / "checkpoints" / "step-000020"
        assert manifest.find_altered(found, manifest.read(found)) is None


@pytest.mark.parametrize("name", ["common.pt", "pipeline/queued/000000"])
def test_a_damaged_checkpoint_is_found_before_any_rank_loads_it(net, checkpoint, name):
    (checkpoint / name).write_bytes(content(9, 2500))
    with pytest.raises(CheckpointDamaged, match=rf"{name} has another checksum") as caught:
        net.courier.deliver(checkpoint, [B])
    assert caught.value.path == str(checkpoint)


def test_a_file_that_is_gone_is_damage(net, checkpoint):
    (checkpoint / "common.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"common\.pt: No such file"):
        net.courier.deliver(checkpoint, [B])


def test_a_host_of_a_rank_that_is_gone_is_named(net, checkpoint):
    net.courier._look()
    net.alive.remove(C)
    assert net.courier.deliver(checkpoint, [B, C]) == C
    net.faults["receive"] = [ActorDiedError()] * 9
    assert net.courier.deliver(checkpoint, [B]) == B


def test_a_host_that_cannot_write_a_checkpoint_is_named_with_the_setting(net, checkpoint, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host_files.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=rf"cannot be written on {B} \(No space left.*cluster\.local_dir"):
        net.courier.deliver(checkpoint, [B])


def test_a_host_whose_disk_changes_what_it_got_is_named(net, checkpoint):
    net.faults["complete"] = [lambda _: "common.pt has another checksum than when it was written"]
    with pytest.raises(CheckpointError, match=rf"did not reach {B}: common\.pt has another.*cluster\.local_dir"):
        net.courier.deliver(checkpoint, [B])


# -- logs ---------------------------------------------------------------------------------------------------------


def log_line(net, host: str, line: str) -> None:
    folder = net.spool(host) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rollout-{host[-1]}.jsonl").open("a") as file:
        file.write(line)


def test_the_last_lines_of_every_host_come_at_the_end_and_spools_are_removed(net):
    log_line(net, B, "one\n")
    net.courier._look()
    net.courier._read_all()
    log_line(net, B, "two\nkilled in the midst")
    log_line(net, C, "a\n")
    net.courier.finish()
    found = {path.name: path.read_text() for path in (net.run / "logs").iterdir()}
    assert found == {"rollout-2.jsonl": "one\ntwo\nkilled in the midst\n", "rollout-3.jsonl": "a\n"}
    assert list((net.run.parents[1] / "disk").iterdir()) == []
    assert (net.run / "shipped.json").read_text() == "{}"


def test_a_dead_host_costs_what_it_had_not_sent_and_its_targets(net):
    log_line(net, B, "one\n")
    targets = net.spool(B) / "prometheus" / "targets"
    targets.mkdir(parents=True)
    (targets / "rollout.json").write_text("[]")
    net.alive.remove(C)
    net.courier._look()
    net.courier._read_all()
    assert (net.run / "prometheus" / "targets" / "rollout.json").exists()
    log_line(net, B, "never sent\n")
    net.faults["read"] = [ActorDiedError()] * 2
    with capture_logs() as logged:
        net.courier._read_all()
        net.courier._read_all()
        net.alive.remove(B)
        net.courier._look()
        net.courier._read_all()
    assert [line["event"] for line in logged] == ["host_not_read", "host_lost"], "once, and not at every attempt"
    assert all(line["host"] == B for line in logged)
    assert not (net.run / "prometheus" / "targets" / "rollout.json").exists()
    assert (net.run / "logs" / "rollout-2.jsonl").read_text() == "one\n"


def test_a_disk_that_is_full_of_logs_ends_no_run(net, monkeypatch):
    log_line(net, B, "one\n")
    net.courier._look()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, capture_logs() as logged:
        patched.setattr(net.courier._arrivals, "_append", full)
        for _ in range(3):
            net.courier._read_all()
    (line,) = logged
    assert (line["event"], line["host"], line["setting"]) == ("lines_not_written", B, "runs")
    net.courier._read_all()
    assert (net.run / "logs" / "rollout-2.jsonl").read_text() == "one\n"


# -- spools -------------------------------------------------------------------------------------------------------


def test_a_process_on_another_host_has_its_spool_as_the_run_folder(net):
    paths = spool.on_host(net.config, B)
    assert paths.spooled
    assert paths.config.run_dir != net.run
    assert paths.config.run_dir.name == net.run.name, "logs name the run"
    there = net.run / "checkpoints" / "step-000020"
    assert paths.here(there) == paths.config.run_dir / "checkpoints" / "step-000020"
    assert paths.folder(there).is_dir()
    with pytest.raises(CheckpointDamaged) as caught, paths.errors_name_the_run_folder():
        raise CheckpointDamaged(str(paths.here(there)), "x")
    assert caught.value.path == str(there)
    with pytest.raises(CheckpointError, match=str(there)), paths.errors_name_the_run_folder():
        raise CheckpointError(f"{paths.here(there)} does not fit")


def test_where_the_run_folder_is_nothing_changes(net):
    for config, address in ((net.config, HOME), (validate({"model": {"path": "m"}, "data": {"train": "t"}}), B)):
        paths = spool.on_host(config, address)
        assert paths.config is config
        assert not paths.spooled
        assert paths.here(Path("/elsewhere")) == Path("/elsewhere")


def test_a_folder_that_cannot_be_made_is_an_error_that_names_host_and_setting(net, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").touch()
    cluster = net.config.cluster.model_copy(update={"local_dir": tmp_path / "disk" / "file"})
    with pytest.raises(ResourceError, match=rf"^cluster\.local_dir: cannot make .* on {B} \(.*; set cluster"):
        spool.on_host(net.config.model_copy(update={"cluster": cluster}), B)
    assert spool.why_unusable(tmp_path / "disk" / "file").startswith("nothing can be written to ")
    assert spool.why_unusable(tmp_path / "disk" / "made") == ""
    assert list((tmp_path / "disk" / "made").iterdir()) == []


def test_two_runs_of_one_name_have_different_spools(net):
    other = net.config.model_copy(update={"runs": net.config.runs / "other"})
    assert spool.on_host(other, B).config.runs != spool.on_host(net.config, B).config.runs


def test_spools_among_the_temporary_files_are_this_user_s_alone(net, tmp_path, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "gettempdir", lambda: str(tmp_path))
    cluster = net.config.cluster.model_copy(update={"local_dir": None})
    config = net.config.model_copy(update={"cluster": cluster})
    made = spool.on_host(config, B).config.runs.parents[1]
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
    other = made.stat().st_uid + 1
    made.rename(tmp_path / f"async_rl-{other}")
    monkeypatch.setattr(spool.os, "getuid", lambda: other)
    with pytest.raises(ResourceError, match=rf"async_rl-{other} belongs to another user"):
        spool.on_host(config, B)
    # A folder of the user's choice may be that of all users, but not the run's folder in it.
    monkeypatch.undo()
    given = spool.on_host(net.config, B).config.runs.parent
    assert given.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(spool.os, "getuid", lambda: other)
    assert spool.why_unusable(given.parent) == ""
    with pytest.raises(ResourceError, match="belongs to another user"):
        spool.on_host(net.config, B)
