"""A run whose replicas come and go with their hosts: Ray nodes on one machine, with one CPU each for one engine.

Ray, driver, trainer, queue and weights are real, the engines are scripted. Ray's own autoscaler reads what waits for a
host from the same table as these tests.
"""

import contextlib
import os
import signal
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from async_rl.config.loading import load
from async_rl.doctor.placement import filled
from async_rl.observe import spans
from tests.cluster.test_host_loss import QUICK
from tests.integration.test_cluster_doctor import package, python_path
from tests.support.invariants import check
from tests.support.real_run import ROOT, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow]

STORE_BYTES = 100 * 2**20
WITHIN_S = 300.0
"""Ends a test that hangs, and judges no time."""
# So many steps at the recipe's rate would end in a model that repeats itself.
ENDLESS = {"trainer__steps": 100_000, "trainer__optimizer__lr": 1e-6, "eval__n": 1}


class Hosts:
    """The driver's host, with room for the trainer alone, and hosts with room for one engine each."""

    def __init__(self, address):
        self._shared = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
        head = self._shared | {"num_cpus": 2, "node_ip_address": f"{address}.2", "_system_config": QUICK}
        self._network, self._count = address, 2
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address

    def add(self, **options):
        self._count += 1
        address = f"{self._network}.{self._count}"
        return self._cluster.add_node(num_cpus=1, node_ip_address=address, **self._shared, **options)

    def kill(self, host):
        """End a host, with all of its processes, as a power cut does."""
        self._cluster.remove_node(host, allow_graceful=False)

    def groups(self, state):
        """Return how many placement groups are in this state."""
        return sum(group["state"] == state for group in placement_group_table().values())

    @property
    def taken(self):
        """CPUs that are reserved."""
        return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)

    def close(self):
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.closing(Hosts("127.0.1")) as hosts:
        yield hosts
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(hosts, start_run):
    """start(least, most, section__key=value, ...) -> a run that ends before its hosts do."""
    runs = []

    def start(least, most, **settings):
        settings = {
            "cluster__address": hosts.address,
            **SCRIPTED,
            "rollout__replicas__min": least,
            "rollout__replicas__max": most,
            "resources__trainer_threads": 2,
            "resources__pin_cores": "false",
            **ENDLESS,
        } | settings
        runs.append(start_run(**settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def replicas(run):
    """Return how many replicas do what, as the run's /metrics say."""
    lines = [line for line in run.metrics("pipeline").splitlines() if line.startswith("async_rl_rollout_replicas{")]
    return {line.partition('state="')[2].partition('"')[0]: int(float(line.rpartition(" ")[2])) for line in lines}


def wait_for(run, **expected):
    """Wait until so many replicas do what is named."""
    wait_until(run, lambda: expected.items() <= replicas(run).items(), f"{expected} expected")


def wait_until(run, condition, otherwise):
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert run.process.poll() is None, f"the run ended:\n{run.output}"
        assert time.monotonic() < deadline, f"{otherwise}, {replicas(run)}:\n{run.output[-5000:]}"
        time.sleep(0.2)


def wait_for_more(run, steps):
    run.wait_for_step(len(run.rows) + steps)


def test_invariant_5_a_run_grows_with_its_hosts_and_goes_on_without_them_and_no_other_engine_pauses_for_one(
    hosts, start, tmp_path
):
    hosts.add()
    run = start(1, 3)
    run.wait_for_step(2)
    assert replicas(run) == {"working": 1, "waiting": 2, "starting": 0, "lost": 0}
    ray.init(address=hosts.address, logging_level="warning")
    assert hosts.groups("PENDING") == 2, "Ray is asked for hosts for the others"

    second = hosts.add()
    wait_for(run, working=2, waiting=1)
    wait_for_more(run, 3)
    assert len(run.rows[-1]["replica_versions"]) == 2

    hosts.kill(second)
    wait_for(run, working=1, waiting=2)
    wait_for_more(run, 3)
    assert len(run.rows[-1]["replica_versions"]) == 1
    assert hosts.groups("PENDING") == 2, "its place is asked for again"

    hosts.add()
    wait_for(run, working=2, waiting=1)
    wait_for_more(run, 3)

    run.process.terminate()
    assert run.wait() == 130, run.output
    assert [len(run.events(name)) for name in ("replica_joined", "replica_left")] == [2, 1]
    assert run.events("process_restarting") == [], "no restart was counted"
    check(run, tmp_path, scripted=True)
    # The replica that was there all the time was paused for weight syncs alone: at most one more was under way.
    pauses = sum(span.what == "pause" for span in spans.read(run.folder, "rollout-0"))
    assert 0 <= pauses - run.summary["sync"]["count"] <= 1
    deadline = time.monotonic() + WITHIN_S
    while hosts.groups("REMOVED") < len(placement_group_table()) or hosts.taken:
        assert time.monotonic() < deadline, f"the run left {placement_group_table()}, {hosts.taken} CPUs taken"
        time.sleep(0.2)


def test_invariant_5_a_run_that_has_lost_all_of_its_replicas_continues_when_a_host_comes(hosts, start, tmp_path):
    only = hosts.add()
    run = start(1, 2)
    run.wait_for_step(2)
    hosts.kill(only)
    wait_for(run, working=0, waiting=2)
    wait_until(run, lambda: run.events("replicas_short"), "too few replicas are not logged")
    short = run.events("replicas_short")[0]
    assert (short["present"], short["needed"]) == (0, 1)

    hosts.add()
    wait_for(run, working=1, waiting=1)
    wait_for_more(run, 3)
    assert len(run.rows[-1]["replica_versions"]) == 1

    run.process.terminate()
    assert run.wait() == 130, run.output
    assert [len(run.events(name)) for name in ("replica_joined", "replica_left")] == [1, 1]
    assert run.events("process_restarting") == [], "no restart was counted"
    check(run, tmp_path, scripted=True)


def test_a_host_that_joins_with_another_package_is_named_once_and_gets_no_replica(hosts, start, tmp_path):
    hosts.add()
    run = start(1, 3)
    run.wait_for_step(1)
    packages = tmp_path / "packages"  # not where the driver is, which would find it there
    packages.mkdir()
    unfit = hosts.add(env_vars=python_path(package(packages, "torch", "2.12.0")))
    wait_until(run, lambda: run.events("host_unfit"), "the host is not named")
    hosts.add()
    wait_for(run, working=2, waiting=1)
    wait_for_more(run, 2)

    run.process.terminate()
    assert run.wait() == 130, run.output
    (line,) = run.events("host_unfit")
    assert line["host"] == unfit.node_ip_address
    assert line["reason"].startswith("torch: the driver has 2.13.0, other hosts do not (")
    assert run.events("replica_left") == []


def test_on_one_host_as_many_replicas_work_as_have_room(start_run, tmp_path):
    """A run that starts a cluster of its own, on whose cores two engines and the trainer do not fit one by one."""
    threads = max(1, os.cpu_count() // 2)
    run = start_run(
        **SCRIPTED,
        rollout__replicas__min=2,
        rollout__replicas__max=5,
        resources__engine_threads=threads,
        resources__trainer_threads=threads,
        **ENDLESS,
    )
    run.wait_for_step(1)
    config = load(run.folder / "config.yaml")
    room = filled(config, {"here": os.cpu_count()})["here"].engines
    assert room < 5
    wait_for(run, working=room, waiting=5 - room)
    wait_for_more(run, 2)
    assert len(run.rows[-1]["replica_versions"]) == room

    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    check(run, tmp_path, scripted=True)
