"""Where a run's actors are on a cluster: on Ray's own stand-in for several hosts, with GPUs that are only counted.

All hosts are processes of this one, each with an address of its own in 127.0.0.0/8. The driver's host has no GPU.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import astuple

import pytest
import ray
from ray._private.state import actors as actor_table
from ray.cluster_utils import Cluster

from async_rl.config.loading import validate
from async_rl.config.operation import WatchdogSection
from async_rl.doctor import placement
from async_rl.driver import actors, cluster
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.cluster import ray_cluster
from async_rl.driver.places import Places
from async_rl.driver.starting import wait_started
from async_rl.errors import ConfigError, ResourceError, StalledError, TrainerDied
from async_rl.queue.start import start_queue
from async_rl.runtime.addresses import split_port
from async_rl.trainer.parallel import Place, world_size
from tests.support import placed_actors, queue_parts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HOSTS, GPUS, CORES = 4, 8, 2
FIRST = 3
"""The last number of the first host's address."""
STORE_BYTES = 80 * 2**20
PATIENCE_S = 120


@pytest.fixture(scope="module")
def hosts():
    """A cluster of the driver's host and HOSTS hosts with GPUs."""
    for module in (placed_actors, queue_parts):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    # Not 127.0.0.1, for which Ray puts this machine's own address when a driver joins.
    head = {"num_cpus": CORES, "node_ip_address": "127.0.0.2", "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
    try:
        for number in range(HOSTS):
            add_host(cluster, number)
        yield cluster
    finally:
        cluster.shutdown()


def add_host(cluster, number):
    return cluster.add_node(
        num_cpus=CORES,
        num_gpus=GPUS,
        node_ip_address=f"127.0.0.{FIRST + number}",
        object_store_memory=STORE_BYTES,
    )


def settings(hosts, **sections):
    tree = {
        "name": "placed",
        "model": {"path": "m"},
        "data": {"train": "t"},
        "resources": {"device": "cuda"},
        "cluster": {"address": hosts.address},
    }
    return validate(tree | sections)


@pytest.fixture
def join(hosts, monkeypatch):
    """join(section={...}, ...) -> RunConfig; this process is the driver of a run on the cluster until the test ends."""
    monkeypatch.setattr(actors, "TrainerActor", placed_actors.PlacedRank)
    monkeypatch.setattr(actors, "RolloutActor", placed_actors.PlacedWorker)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:

        def join(**sections):
            config = settings(hosts, **sections)
            stack.enter_context(ray_cluster(config))
            return config

        yield join
    for number, handler in handlers.items():
        signal.signal(number, handler)


async def placed(config, abort_s=PATIENCE_S):
    """Return the places of a run once they are reserved."""
    places = Places(config)
    watchdog = WatchdogSection(stall_s=min(abort_s, 10), abort_s=abort_s)
    await wait_started(places.reserved(), watchdog, lambda *_, **__: None, places.free)
    return places


async def started(config):
    """Return ranks and workers of a run, which say where they are."""
    places = await placed(config)
    ranks, rollouts = TrainerRanks(config, places), RolloutWorkers(config, None, places)
    for replica in range(config.rollout.replica_range.min):
        await rollouts.placed(replica)
        rollouts.replace(replica)
    await ranks.start()
    return ranks, rollouts


async def where(proxies):
    return await asyncio.gather(*(actor.where.remote() for actor in proxies.actors))


def assert_inner_groups_are_whole(config, ranks):
    """The ranks that differ in tensor and context parallelism alone are on one host, on GPUs of their own."""
    sizes, by_group = config.trainer.parallel, {}
    for rank, (seen, _) in enumerate(ranks):
        place = Place.of(sizes, rank)
        by_group.setdefault((place.pp, place.dp), set()).add(seen.host)
    assert {len(hosts) for hosts in by_group.values()} == {1}
    gpus = [(seen.host, gpu) for seen, _ in ranks for gpu in seen.gpus]
    assert len(set(gpus)) == len(gpus) == world_size(sizes)


async def test_ranks_that_exchange_most_share_a_host_engines_are_whole_and_a_restart_brings_each_back(join):
    config = join(
        trainer={"parallel": {"tp": 2, "cp": 2, "dp": 2, "pp": 2}},
        rollout={"replicas": 3, "tensor_parallel_size": 4},
    )
    ranks, rollouts = await started(config)
    first, engines = await where(ranks), await where(rollouts)
    assert_inner_groups_are_whole(config, first)
    assert len({seen.host for seen, _ in first}) == 2, "packed on as few hosts as possible"
    assert [len(seen.gpus) for seen in engines] == [4, 4, 4]
    gpus = [(seen.host, gpu) for seen in engines for gpu in seen.gpus]
    assert len(set(gpus)) == len(gpus)
    assert {seen.environment["OMP_NUM_THREADS"] for seen, _ in first} == {"8"}
    assert {seen.cores for seen, _ in first} == {seen.cores for seen in engines} == {None}

    ranks.replace()
    await ranks.start()
    rollouts.replace(1)
    assert [seen.host for seen, _ in await where(ranks)] == [seen.host for seen, _ in first]
    assert (await where(rollouts))[1].host == engines[1].host


async def test_a_trainer_and_an_engine_share_one_gpu_of_one_host(join):
    config = join(resources={"device": "cuda", "share_gpu": True})
    ranks, rollouts = await started(config)
    ((rank, _),), (engine,) = await where(ranks), await where(rollouts)
    assert (rank.host, rank.gpus) == (engine.host, engine.gpus)
    assert len(rank.gpus) == 1
    rollouts.replace(0)
    assert (await where(rollouts))[0].gpus == rank.gpus


@pytest.mark.parametrize(
    ("parallel", "replicas", "engine_gpus"),
    [
        ({"tp": 8, "dp": 2}, 2, 8),
        ({"tp": 4, "cp": 2, "pp": 3}, 1, 8),
        ({"tp": 2, "dp": 4, "ep": 8}, 12, 2),
        ({"dp": 4}, 3, 8),
        ({"dp": 12}, 4, 5),  # placed first, the ranks would leave room for two engines
    ],
)
async def test_a_layout_that_fits_is_placed_and_whole_where_the_plan_says(join, parallel, replicas, engine_gpus):
    config = join(trainer={"parallel": parallel}, rollout={"replicas": replicas, "tensor_parallel_size": engine_gpus})
    places = await placed(config)
    chosen = [place.options["scheduling_strategy"] for place in await places.of_trainer()]
    table = ray.util.placement_group_table(chosen[0].placement_group)["bundles_to_node_id"]
    hosts = [table[strategy.placement_group_bundle_index] for strategy in chosen]
    sizes = config.trainer.parallel
    inner = max(sizes.tp * sizes.cp, sizes.ep)
    for first in range(0, world_size(sizes), inner):
        assert len(set(hosts[first : first + inner])) == 1
    # Each host is one run of neighbours: its ranks are numbered in turn.
    assert len(set(hosts)) == 1 + sum(here != there for here, there in itertools.pairwise(hosts))
    engines = []
    for replica in range(replicas):
        group = places.of_replica(replica)[0].options["scheduling_strategy"].placement_group
        assert group.bundle_specs == [{"GPU": engine_gpus}]
        engines += ray.util.placement_group_table(group)["bundles_to_node_id"].values()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    planned = placement.plan(config, list(nodes.values())).loads
    # Of hosts that are alike, Ray takes any.
    assert Counter((engines.count(node), hosts.count(node)) for node in nodes) == Counter(map(astuple, planned))


async def restarted(ranks):
    """Start ranks again as a run does: until Ray has noticed that a host is lost, it creates actors there that die."""
    while True:
        ranks.replace()
        with contextlib.suppress(TrainerDied):
            return await ranks.start()


async def test_ranks_of_a_lost_host_come_back_on_another_as_neighbours(hosts, join):
    config = join(trainer={"parallel": {"tp": 4, "dp": 4}}, rollout={"replicas": 1})
    extra = lost = add_host(hosts, HOSTS)
    try:
        ranks, _ = await started(config)
        before = await where(ranks)
        victim = before[0][0].host
        lost = next(node for node in (*hosts.worker_nodes, extra) if node.node_id == victim)
        hosts.remove_node(lost, allow_graceful=False)
        await asyncio.wait_for(restarted(ranks), PATIENCE_S)
        after = await where(ranks)
        assert_inner_groups_are_whole(config, after)
        assert victim not in {seen.host for seen, _ in after}
        kept = Counter(seen.host for seen, _ in before if seen.host != victim)
        assert kept <= Counter(seen.host for seen, _ in after), "what was not lost stays"
    finally:
        if lost is not extra:
            hosts.remove_node(extra)
            add_host(hosts, int(lost.node_ip_address.rpartition(".")[2]) - FIRST)


async def test_what_is_not_placed_is_named_with_what_each_host_has_left(join):
    config = join(rollout={"replicas": 2, "tensor_parallel_size": 16})
    named = r"rollout-0, rollout-1 did not start .* 127\.0\.0\.6: 2 CPU, . GPU; .*; "
    with pytest.raises(StalledError, match=named + r"not placed: rollout-0, 16 GPU on one host, rollout-1, 16 GPU"):
        await placed(config, abort_s=1)


async def test_the_queue_is_on_the_drivers_host(join):
    config = join()
    queues = [start_queue(config, queue_parts.Source()) for _ in range(3)]
    for queue in queues:
        await queue.stats()
    here = ray.get_runtime_context().get_node_id()
    assert [actor_table(queue.actor._actor_id.hex())["Address"]["NodeID"] for queue in queues] == [here] * 3


async def test_ranks_on_two_hosts_meet_at_the_first_ones_address(join, monkeypatch, tmp_path):
    monkeypatch.setattr(actors, "TrainerActor", placed_actors.MeetingRank)
    # Threads for a whole host, so that no two ranks share one.
    resources = {"device": "cpu", "trainer_threads": CORES}
    config = join(trainer={"parallel": {"dp": 2}}, resources=resources, runs=str(tmp_path))
    ranks = TrainerRanks(config, await placed(config))
    await asyncio.wait_for(ranks.start(), PATIENCE_S)
    met = await asyncio.gather(*(rank.met.remote() for rank in ranks.actors))
    (first, address, _), (second, _, _) = met
    assert first.host != second.host
    assert split_port(address)[0] == first.address != second.address
    assert [total for *_, total in met] == [3.0, 3.0]


async def test_actors_have_the_runs_environment_and_cores_of_their_own_host(join, monkeypatch):
    monkeypatch.setitem(cluster._ENVIRONMENT, "ASYNC_RL_ONLY_OF_THE_DRIVER", "yes")
    config = join(resources={"device": "cpu"}, rollout={"replicas": 3}, trainer={"parallel": {"dp": 2}})
    ranks, rollouts = await started(config)
    seen = [*(seen for seen, _ in await where(ranks)), *await where(rollouts)]
    assert {one.environment.get("ASYNC_RL_ONLY_OF_THE_DRIVER") for one in seen} == {"yes"}
    assert {one.environment["OMP_NUM_THREADS"] for one in seen} == {"1"}
    for host, count in Counter(one.host for one in seen).items():
        shares = [one.cores for one in seen if one.host == host]
        assert sorted(share.first for share in shares) == list(range(count))
        assert {share.needed for share in shares} == {count}


DRIVER = """
import sys, time
from async_rl.config.loading import validate
from async_rl.driver.cluster import ray_cluster

tree = {"name": sys.argv[1], "model": {"path": "m"}, "data": {"train": "t"}, "cluster": {"address": sys.argv[2]}}
config = validate(tree)
with ray_cluster(config):
    print("joined", flush=True)
    time.sleep(600)
"""


def test_a_second_run_of_a_name_is_refused_until_the_first_has_ended(hosts, join, monkeypatch):
    other = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "placed", hosts.address], stdout=subprocess.PIPE, env=dict(os.environ), text=True
    )
    try:
        assert "joined" in other.stdout.readline()
        monkeypatch.setattr(cluster, "_NAME_HELD_S", 1.0)
        with pytest.raises(ConfigError, match=r"a run named placed is under way on the Ray cluster at \S+; give"):
            join()
        assert not ray.is_initialized()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    monkeypatch.setattr(cluster, "_NAME_HELD_S", 60.0)
    join()


def test_a_cluster_that_is_not_there_is_one_line(join):
    began = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"at 127\.0\.0\.1:1 cannot be joined: .*refused; set cluster\.address"
    ) as error:
        join(cluster={"address": "127.0.0.1:1"})
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60
