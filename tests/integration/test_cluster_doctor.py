"""Every host of a cluster is looked at before a run starts: real Ray nodes with logical GPUs, on this machine.

The driver's node has no GPU. Nodes differ from it by what their PYTHONPATH has: other metadata of a package, another
copy of this package.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from async_rl.config.loading import validate
from async_rl.config.paths import absolute
from async_rl.driver import hosts
from async_rl.errors import ConfigError, ResourceError
from tests.support.model_folders import write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # five nodes of Ray: more than 5 s

ROOT = Path(__file__).resolve().parents[2]
# Sixteen GPUs in all.
LAYOUT = {"rollout": {"replicas": 2, "tensor_parallel_size": 4}, "trainer": {"parallel": {"dp": 8}}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A node without GPUs, on which the driver is, and two with eight each and a torch that is built for them."""
    of_gpu_hosts = python_path(package(tmp_path_factory.mktemp("gpu_host"), "torch", "2.13.0"))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=8, env_vars=of_gpu_hosts)
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def settings(cluster, tmp_path, monkeypatch):
    """The settings of a run of sixteen GPUs that joins the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.chdir(write_inputs(tmp_path))

    def of(**sections):
        base = {
            "model": {"path": "model", "dtype": "float32"},
            "data": {"train": "train.jsonl", "max_prompt_tokens": 4},
            "sync": {"backend": "nccl"},
        }
        tree = {**base, **LAYOUT, **sections}
        return validate({**tree, "rollout": {**tree["rollout"], "max_response_tokens": 100}})

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield of
    for number, handler in handlers.items():
        signal.signal(number, handler)


def package(folder: Path, name: str, version: str) -> Path:
    """Write the metadata of a package of that version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def python_path(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}


def refused(settings, error) -> str:
    with pytest.raises(error) as caught, hosts.joined(absolute(settings)):
        raise AssertionError("the run would start")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_driver_without_a_gpu_starts_a_run_on_the_gpus_of_the_cluster(settings, tmp_path):
    with hosts.joined(absolute(settings())) as joined:
        assert joined.resources.device == "cuda"
        # What processes on hosts without RAY_ADDRESS need.
        assert joined.cluster.address == ray.get_runtime_context().gcs_address
        # All nodes have one address here, so this is one host.
        assert joined.metrics.host == "127.0.0.1"
    text, can_start = hosts.examine(settings())
    assert can_start, text
    assert "16 on 3 hosts, 16 needed" in text
    assert text.count("2 engines") == 1
    assert text.count("8 trainer ranks") == 1
    assert text.endswith("a run can start on this cluster\n")
    # The folder of the runs was made to write into it, and is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "model", "train.jsonl"]


def test_an_engine_needs_its_gpus_on_one_host(settings):
    wide = settings(rollout={"tensor_parallel_size": 16}, trainer={})
    line = refused(wide, ResourceError)
    assert line.startswith("GPUs: no host has 16 GPUs for an engine (")
    assert line.count(": 8") == 2
    assert "16 GPUs" in line
    text, can_start = hosts.examine(wide)
    assert not can_start
    assert line.partition("; ")[0].partition(": ")[2] in text


def test_an_interface_that_no_host_has(settings):
    line = refused(settings(cluster={"interface": "noeth9"}), ConfigError)
    assert line.startswith("cluster.interface: noeth9 is no interface with an address on every host: ")


def test_a_module_that_only_the_driver_finds(settings, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "reward_of_the_driver.py").write_text("def reward(prompt, response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(elsewhere)
    line = refused(settings(reward={"function": "reward_of_the_driver:reward"}), ConfigError)
    assert line.startswith("reward.function: the module reward_of_the_driver is not found on ")


@pytest.mark.parametrize(
    ("difference", "part"),
    [
        ("package", "msgpack: the driver has 1."),
        ("code", "async_rl: the driver has 0.1.0 ("),
        ("older", "hosts: "),
    ],
)
def test_a_host_with_another_version(cluster, settings, tmp_path, difference, part):
    folder = tmp_path / "other"
    folder.mkdir()
    if difference == "package":
        package(folder, "msgpack", "0.9.0")
    else:
        shutil.copytree(ROOT / "async_rl", folder / "async_rl")
        changed = folder / "async_rl" / "types.py"
        changed.write_text(changed.read_text() + "# changed\n")
    if difference == "older":  # than the function that looks at a host
        (folder / "async_rl" / "doctor" / "host.py").unlink()
    torch = package(tmp_path, "torch", "2.13.0")
    node = cluster.add_node(num_cpus=1, num_gpus=8, env_vars=python_path(folder, torch))
    try:
        line = refused(settings(), ResourceError)
    finally:
        cluster.remove_node(node)
    assert line.startswith(part)
    if difference == "older":
        assert "No module named 'async_rl.doctor.host'" in line
    else:
        assert f"({ray_name(node)}: " in line


def test_a_host_that_does_not_answer_is_named(cluster, settings, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.mkdir()
    # Every worker process of the node begins with a pause, so that none gets to the task.
    pause = "import sys, time\nif any('default_worker' in word for word in sys.orig_argv):\n    time.sleep(600)\n"
    (slow / "sitecustomize.py").write_text(pause)
    monkeypatch.setattr(hosts, "ANSWER_S", 15.0)
    node = cluster.add_node(num_cpus=1, num_gpus=8, env_vars=python_path(slow))
    try:
        line = refused(settings(), ResourceError)
    finally:
        cluster.remove_node(node)
    # On a busy machine others may be late as well, and are named too.
    assert line.startswith("hosts: ")
    assert f"{ray_name(node)}: no answer within 15 s" in line


def ray_name(node) -> str:
    return f"{node.node_ip_address} ({node.node_id[:6]})"
