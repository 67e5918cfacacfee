"""Files of hosts that do not have the run folder, through real Ray: two Ray nodes with an address each on one machine.

What writes there stands in for a rollout worker and a trainer rank.
"""

import asyncio
import sys
import time

import numpy as np
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from structlog.testing import capture_logs

from async_rl.config.loading import validate
from async_rl.driver import queued_groups
from async_rl.driver.remote_files import RemoteFiles, courier
from async_rl.errors import TrainerDied
from async_rl.runtime import manifest, spool
from tests.cluster.hosts import wait_until
from tests.support.own_cluster import own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Not 127.0.0.1, for which Ray puts this machine's own address when a driver joins.
HOME, OTHER = "127.0.0.2", "127.0.0.3"
STORE_BYTES = 200 * 2**20
# More than two chunks, the last one not whole.
SHARD_BYTES = 2 * 16 * 2**20 + 12345
WITHIN_S = 120.0


class Writer:
    """A process of a run that writes a log and files of a checkpoint."""

    def __init__(self, config):
        self._paths = spool.on_this_host(config)

    def log(self, lines):
        path = self._paths.config.run_dir / "logs" / "trainer-1.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        return str(path)

    def write(self, folder, name, seed, nbytes):
        return {name: manifest.write_file(self._paths.folder(folder) / name, np.random.default_rng(seed).bytes(nbytes))}

    def files(self, folder):
        top = self._paths.here(folder)
        return manifest.find_altered(top, manifest.read(top)), sorted(path.name for path in top.rglob("*"))

    def message(self, seed):
        return np.random.default_rng(seed).integers(0, 256, 10**6, dtype=np.uint8)


@pytest.fixture
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    head = {"num_cpus": 2, "node_ip_address": HOME, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    with own_cluster(**head) as made:
        made.other = made.add_node(num_cpus=1, node_ip_address=OTHER, object_store_memory=STORE_BYTES)
        ray.init(address=made.address, namespace="run", log_to_driver=False)
        made.wait_for_nodes()
        yield made


@pytest.fixture
def config(tmp_path, cluster):
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    return validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "runs": str(tmp_path / "runs"),
            "cluster": {
                "address": cluster.address,
                "shared_fs": False,
                "local_dir": str(tmp_path / "spools"),
                "run_host": HOME,
            },
        }
    )


def writer_on(node_id, config):
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Writer).options(num_cpus=0, scheduling_strategy=place).remote(config)


async def addresses():
    return [HOME, OTHER]


async def test_logs_checkpoint_and_messages_reach_the_run_folder_and_nothing_is_left(cluster, config, tmp_path):
    files, log = RemoteFiles(config), config.run_dir / "logs" / "trainer-1.jsonl"
    with courier(config):
        writer = writer_on(cluster.other.node_id, config)
        path = await writer.log.remote(["one", "two"])
        assert path.startswith(str(tmp_path / "spools"))
        wait_until(lambda: log.exists() and log.read_text() == "one\ntwo\n", WITHIN_S, "lines of the other host")

        partial = config.run_dir / "checkpoints" / "step-000001.partial"
        partial.mkdir()
        here = writer_on(ray.get_runtime_context().get_node_id(), config)
        entries = await here.write.remote(partial, "__0_0.distcp", 0, 1000)
        entries |= await writer.write.remote(partial, "__1_0.distcp", 1, SHARD_BYTES)
        assert await files.complete(partial, entries) == []
        assert manifest.find_altered(partial, entries) is None

        messages = {f"0-{seed}.0": writer.message.remote(seed) for seed in (1, 2)}
        copies = {group_id: [message] for group_id, message in messages.items()}
        saved = await queued_groups.write(partial / "pipeline" / "queued", copies, everywhere=False)
        loaded = await queued_groups.load(
            {i: partial / "pipeline" / "queued" / file for i, (file, _) in saved.items()}, [files]
        )
        for group_id, reference in loaded.items():
            assert np.array_equal(await reference, await messages[group_id])
        assert list(loaded) == list(messages)

        manifest.write(partial, entries | {f"pipeline/queued/{file}": entry for file, entry in saved.values()})
        final = partial.rename(partial.with_suffix(""))
        await files.deliver(final, addresses)
        damage, there = await writer.files.remote(final)
        assert (damage, there) == (None, ["__0_0.distcp", "__1_0.distcp", "manifest.json"])
        await files.clear()

        await writer.log.remote(["three"])
        ray.kill(writer)  # what it left is brought all the same
    assert log.read_text() == "one\ntwo\nthree\n"
    assert list((tmp_path / "spools").iterdir()) == []


async def test_a_courier_that_is_killed_continues_and_adds_no_line_twice(cluster, config):
    log = config.run_dir / "logs" / "trainer-1.jsonl"
    with courier(config):
        writer = writer_on(cluster.other.node_id, config)
        await writer.log.remote(["one"])
        wait_until(lambda: log.exists() and log.read_text() == "one\n", WITHIN_S, "the first line")
        wait_until((config.run_dir / "shipped.json").exists, WITHIN_S, "the position")
        ray.kill(RemoteFiles(config)._courier, no_restart=False)
        await writer.log.remote(["two"])
        wait_until(lambda: log.read_text() == "one\ntwo\n", WITHIN_S, "the second line")
        partial = config.run_dir / "checkpoints" / "step-000001.partial"
        entries = await writer.write.remote(partial, "a", 1, 1000)
        assert await RemoteFiles(config).complete(partial, entries) == []


async def test_a_host_that_is_lost_is_named_and_costs_its_files_alone(cluster, config):
    files, log = RemoteFiles(config), config.run_dir / "logs" / "trainer-1.jsonl"
    with courier(config):
        writer = writer_on(cluster.other.node_id, config)
        await writer.log.remote(["one"])
        wait_until(lambda: log.exists() and log.read_text() == "one\n", WITHIN_S, "the first line")
        partial = config.run_dir / "checkpoints" / "step-000001.partial"
        partial.mkdir()
        entries = await writer.write.remote(partial, "__1_0.distcp", 1, 1000)
        entries |= {"__0_0.distcp": manifest.write_file(partial / "__0_0.distcp", b"here")}
        cluster.remove_node(cluster.other, allow_graceful=False)
        alive = lambda: {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # noqa: E731
        wait_until(lambda: alive() == {HOME}, WITHIN_S, "the loss is known")
        with capture_logs() as logged:
            assert await asyncio.wait_for(files.complete(partial, entries), WITHIN_S) == ["__1_0.distcp"]
        assert [(line["event"], line["hosts"]) for line in logged] == [("checkpoint_files_lost", OTHER)]
        manifest.write(partial, {"__0_0.distcp": entries["__0_0.distcp"]})
        with pytest.raises(TrainerDied, match=f"the host {OTHER} of a trainer rank was lost"):
            await asyncio.wait_for(files.deliver(partial, addresses), WITHIN_S)
        began = time.monotonic()
    assert time.monotonic() - began < WITHIN_S
    assert log.read_text() == "one\n"
