"""Finished groups of a checkpoint on two hosts of Ray: written where they lie, and loaded without the driver."""

import asyncio

import numpy as np
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from structlog.testing import capture_logs

from async_rl.driver import queued_groups
from async_rl.driver.actors import RolloutHandle
from async_rl.rollout.actor import RolloutActor
from async_rl.runtime.manifest import checksum
from tests.support.own_cluster import own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MESSAGE_BYTES = 10**6  # more than what Ray keeps in the process that asked for it


@pytest.fixture(scope="module")
def cluster():
    """Two hosts, the driver on the first."""
    store = 100 * 2**20
    with own_cluster(num_cpus=1, object_store_memory=store) as made:
        made.other = made.add_node(num_cpus=1, object_store_memory=store)
        made.connect()
        made.wait_for_nodes()
        yield made


def message(seed, nbytes=MESSAGE_BYTES):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def made_on(host, seeds):
    """Messages that a worker of ``host`` finished; the driver has not seen them."""
    place = NodeAffinitySchedulingStrategy(host, soft=False)
    # As a worker's message, which cannot be made again when it is lost.
    make = ray.remote(num_cpus=0, scheduling_strategy=place, max_retries=0)(message)
    references = {f"0-{seed}.0": make.remote(seed) for seed in seeds}
    ray.wait(list(references.values()), num_returns=len(references), fetch_local=False)
    return references


class Reader:
    """A worker without an engine."""

    read_message = RolloutActor.read_message


def write(folder, references):
    payloads = {group_id: [reference] for group_id, reference in references.items()}
    return asyncio.run(asyncio.wait_for(queued_groups.write(folder, payloads), 120))


def hosts_of(references):
    found = ray.experimental.get_object_locations(list(references.values()))
    return {group_id: found[reference]["node_ids"] for group_id, reference in references.items()}


def test_messages_are_written_by_the_host_that_has_them(cluster, tmp_path):
    here = ray.get_runtime_context().get_node_id()
    elsewhere = cluster.other.node_id
    far, near = made_on(elsewhere, (1, 2, 3)), made_on(here, (4, 5))
    small = {"0-6.0": ray.put(message(6, nbytes=100))}
    saved = write(tmp_path / "queued", far | near | small)
    for number, (group_id, (file, entry)) in enumerate(saved.items(), start=1):
        assert group_id == f"0-{number}.0"
        written = message(number, nbytes=100 if number == 6 else MESSAGE_BYTES)
        assert np.array_equal(np.fromfile(tmp_path / "queued" / file, dtype=np.uint8), written)
        assert entry == (written.nbytes, checksum(tmp_path / "queued" / file))
    assert len(saved) == 6
    assert set(map(tuple, hosts_of(far).values())) == {(elsewhere,)}, "they did not come here"
    assert set(map(tuple, hosts_of(near).values())) == {(here,)}


def test_files_are_read_by_all_workers_and_one_that_is_gone_costs_one_group(cluster, tmp_path):
    hosts = ray.get_runtime_context().get_node_id(), cluster.other.node_id
    reader = ray.remote(num_cpus=0)(Reader)
    places = [NodeAffinitySchedulingStrategy(host, soft=False) for host in hosts]
    workers = [RolloutHandle(reader.options(scheduling_strategy=place).remote()) for place in places]
    files = {}
    for seed in range(4):
        files[f"0-{seed}.0"] = tmp_path / f"{seed:06}"
        message(seed).tofile(files[f"0-{seed}.0"])
    files["0-9.0"] = tmp_path / "gone"
    with capture_logs() as logged:
        loaded = asyncio.run(queued_groups.load(files, workers))
    assert list(loaded) == ["0-0.0", "0-1.0", "0-2.0", "0-3.0"]
    assert hosts_of(loaded) == {f"0-{seed}.0": [hosts[seed % 2]] for seed in range(4)}, "each host has a share"
    for seed, reference in enumerate(loaded.values()):
        assert np.array_equal(ray.get(reference), message(seed))
    (line,) = [line for line in logged if line["event"] == "queued_group_not_loaded"]
    assert line["group"] == "0-9.0"
    assert line["reason"].startswith("FileNotFoundError")


def test_messages_that_are_lost_with_their_host_are_named_and_the_others_written(cluster, tmp_path):
    here = ray.get_runtime_context().get_node_id()
    doomed = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    far, near = made_on(doomed.node_id, (1, 2)), made_on(here, (3,))
    cluster.remove_node(doomed)
    with capture_logs() as logged:
        saved = write(tmp_path / "queued", far | near)
    assert list(saved) == ["0-3.0"]
    assert [line["group"] for line in logged if line["event"] == "queued_group_not_saved"] == ["0-1.0", "0-2.0"]


def test_a_copy_is_written_of_a_message_that_is_lost_with_its_host(cluster, tmp_path):
    doomed = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    first, second = made_on(doomed.node_id, (1, 2)), made_on(cluster.other.node_id, (1, 2))
    cluster.remove_node(doomed)
    payloads = {group_id: [first[group_id], second[group_id]] for group_id in first}
    saved = asyncio.run(asyncio.wait_for(queued_groups.write(tmp_path / "queued", payloads), 120))
    for seed, (file, entry) in enumerate(saved.values(), start=1):
        assert np.array_equal(np.fromfile(tmp_path / "queued" / file, dtype=np.uint8), message(seed))
        assert entry.bytes == MESSAGE_BYTES
    assert list(saved) == ["0-1.0", "0-2.0"]
    assert set(map(tuple, hosts_of(second).values())) == {(cluster.other.node_id,)}, "they did not come here"


def test_a_folder_that_cannot_be_written_is_an_error(cluster, tmp_path):
    (tmp_path / "queued").mkdir()
    (tmp_path / "queued" / "000000").mkdir()  # in the place of the file
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "queued", {"0-1.0": ray.put(message(1))})
