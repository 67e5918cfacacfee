"""Which cores are near the GPUs of a process: hosts are folders as the kernel lays them out, NVML is a stand-in."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from async_rl.config.loading import validate
from async_rl.config.operation import ResourcesSection
from async_rl.rollout import actor as rollout_actor
from async_rl.rollout.engine.vllm import process as vllm_process
from async_rl.runtime import numa
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.numa import NearGpus, near, own_cores, pci_addresses
from async_rl.trainer import actor as trainer_actor

# Two sockets of eight cores, each core twice; GPU memory that is a node without cores.
NODES = {0: "0-7,16-23", 1: "8-15,24-31", 2: ""}
FIRST, SECOND = (*range(8), *range(16, 24)), (*range(8, 16), *range(24, 32))
GPUS = {"0000:1b:00.0": 0, "0000:43:00.0": 0, "0000:9c:00.0": 1, "0001:0a:00.0": 1, "0000:ff:00.0": -1}
ALL = range(32)


def config(device):
    return validate({"model": {"path": "m"}, "data": {"train": "t"}, "resources": {"device": device}})


@pytest.fixture
def host(tmp_path):
    def make(nodes=NODES, gpus=GPUS):
        for node, cores in nodes.items():
            folder = tmp_path / "devices/system/node" / f"node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{cores}\n")
        for address, node in gpus.items():
            folder = tmp_path / "bus/pci/devices" / address
            folder.mkdir(parents=True)
            (folder / "numa_node").write_text(f"{node}\n")
        return tmp_path

    return make


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as entries:
        yield entries


def found(host, *gpus, allowed=ALL):
    return near(lambda: gpus, allowed, host)


def test_a_process_is_near_the_node_of_its_gpu(host, logged):
    sysfs = host()
    assert found(sysfs, "0000:43:00.0") == NearGpus((0,), FIRST)
    assert found(sysfs, "0000:9c:00.0") == NearGpus((1,), SECOND)
    assert [entry["event"] for entry in logged] == ["numa_bound"] * 2


def test_an_engine_is_near_all_its_gpus_and_knows_the_node_of_each(host):
    assert found(host(), "0001:0a:00.0", "0000:1b:00.0") == NearGpus((1, 0), tuple(sorted(FIRST + SECOND)))


def test_only_allowed_cores_count_and_too_few_leave_the_process_on_all(host, logged):
    sysfs = host()
    assert found(sysfs, "0000:1b:00.0", allowed=range(4, 20)) == NearGpus((0,), (4, 5, 6, 7, 16, 17, 18, 19))
    assert not [entry for entry in logged if entry["log_level"] == "warning"]
    for allowed in (range(8, 16), range(5, 16)):  # a container on the other socket, and one that reaches over
        assert found(sysfs, "0000:1b:00.0", allowed=allowed) is None
        assert (logged[-1]["event"], logged[-1]["log_level"]) == ("numa_not_bound", "warning")
    assert found(sysfs, "0000:1b:00.0", allowed=[3, 5]) == NearGpus((0,), (3, 5))  # has no others anyway


def test_where_there_is_one_node_no_gpu_is_asked_for(host, logged):
    def not_asked():
        raise AssertionError

    assert near(not_asked, ALL, host(nodes={0: "0-31", 1: ""})) is None
    assert near(not_asked, ALL, Path("/no/such/folder")) is None
    assert not logged


@pytest.mark.parametrize("gpus", [("0000:ff:00.0",), ("0000:1b:00.0", "0000:ff:00.0"), ("0000:77:00.0",), ()])
def test_a_gpu_without_a_known_node_binds_nothing_and_is_logged(host, logged, gpus):
    assert found(host(), *gpus) is None
    assert [entry["event"] for entry in logged] == ["numa_unknown"]


class Nvml:
    """In place of pynvml: GPUs in the order of their addresses."""

    class NVMLError(Exception):
        pass

    uuids = ("GPU-aa", "GPU-bb", "MIG-cc")
    addresses = ((0, 0x1B, 0), (0, 0x9C, 0), (1, 0x0A, 0))
    open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 3

    def nvmlDeviceGetHandleByIndex(self, index):
        if index > 2:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self.uuids.index(uuid)

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(**dict(zip(("domain", "bus", "device"), self.addresses[handle], strict=True)))


@pytest.mark.parametrize(
    ("visible", "addresses"),
    [
        (None, ["0000:1b:00.0", "0000:9c:00.0", "0001:0a:00.0"]),
        ("2,0", ["0001:0a:00.0", "0000:1b:00.0"]),
        ("GPU-bb, MIG-cc", ["0000:9c:00.0", "0001:0a:00.0"]),
        ("", []),
    ],
)
def test_the_gpus_are_those_that_the_process_sees_in_its_order(visible, addresses):
    nvml = Nvml()
    assert pci_addresses(visible, nvml) == addresses
    assert nvml.open == 0


def test_a_fault_of_nvml_and_its_absence_are_said_once_and_bind_nothing(host, logged, monkeypatch):
    sysfs = host()
    assert near(lambda: pci_addresses("7", Nvml()), ALL, sysfs) is None
    assert logged.pop()["reason"] == "NVML: Invalid Argument"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    monkeypatch.setattr(numa, "near", lambda gpus, allowed: near(gpus, allowed, sysfs))
    numa._near_own_gpus.cache_clear()
    on_gpu = ResourcesSection(device="cuda")
    assert own_cores(None, on_gpu) is own_cores(None, on_gpu) is None
    assert [entry["event"] for entry in logged] == ["numa_unknown"]
    assert "nvidia-ml-py is not installed" in logged[0]["reason"]
    numa._near_own_gpus.cache_clear()


@pytest.fixture
def _near_the_second_node(monkeypatch):
    monkeypatch.setattr(numa, "_near_own_gpus", lambda: NearGpus((1, 1), SECOND))


@pytest.mark.usefixtures("_near_the_second_node")
def test_on_cpu_a_process_has_its_share_and_on_gpus_what_is_near_unless_that_is_off():
    share = CoreShare(0, 1, 1)
    assert own_cores(share, ResourcesSection(device="cpu")) == tuple(sorted(os.sched_getaffinity(0)))[:1]
    assert own_cores(None, ResourcesSection(device="cpu")) is None
    assert own_cores(None, ResourcesSection(device="cuda")) == SECOND
    assert own_cores(None, ResourcesSection(device="cuda", numa_bind=False)) is None


@pytest.mark.usefixtures("_near_the_second_node")
@pytest.mark.parametrize(("program", "nodes"), [("/usr/bin/numactl", [1, 1]), (None, None)])
def test_vllm_binds_each_worker_itself_where_it_can(monkeypatch, program, nodes):
    monkeypatch.setattr(vllm_process.shutil, "which", {"numactl": program}.get)
    assert vllm_process._gpu_nodes(config("cuda")) == nodes
    assert vllm_process._gpu_nodes(config("cpu")) is None


@pytest.mark.usefixtures("_near_the_second_node")
@pytest.mark.parametrize(("device", "cores"), [("cuda", [SECOND]), ("cpu", [])])
def test_a_trainer_rank_binds_itself(monkeypatch, device, cores):
    bound = []
    monkeypatch.setattr(trainer_actor, "pin", bound.append)
    monkeypatch.setattr(trainer_actor, "serve_metrics", lambda *_, **__: None)
    monkeypatch.setattr(trainer_actor.logs, "configure", lambda *_, **__: None)
    trainer_actor.TrainerActor(config(device), 0, None, one_host=True)
    assert bound == cores


@pytest.mark.usefixtures("_near_the_second_node")
@pytest.mark.parametrize(("device", "cores"), [("cuda", SECOND), ("cpu", None)])
def test_a_rollout_worker_gives_its_engine_the_cores(monkeypatch, device, cores):
    class EngineMade(Exception):
        pass

    def engine(config, replica, cores):
        raise EngineMade(cores)

    monkeypatch.setattr("async_rl.rollout.engine.loader.load_engine", lambda name: engine)
    monkeypatch.setattr(rollout_actor, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(rollout_actor, "mark_semaphores", lambda _role: None)
    monkeypatch.setattr(rollout_actor.logs, "configure", lambda *_, **__: None)
    with pytest.raises(EngineMade) as made:
        rollout_actor.RolloutActor(config(device), 0, None, None)
    assert made.value.args == (cores,)
