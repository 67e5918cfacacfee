"""Hosts that die while a run uses them, and a network that parts for half a minute: one run goes through all of it.

Each test does its damage and waits until training continues; the invariants are checked from the run's files when the
last one is over. Each also works alone.
"""

import contextlib
import json
import shutil
import time

import pytest

from async_rl.config.loading import load
from async_rl.driver import before_ray
from async_rl.queue.journal import FileJournal
from tests.cluster.runs import HostRun
from tests.support.invariants import check, rebuilt

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.long]

# The head is apart from what is killed, and so is the driver, except where it is what is killed. The trainer and the
# engines begin on the hosts with most room; any two of the last three hosts have room for all.
CPUS = (0, 1, 2, 2)
SETTINGS = {
    "rollout__engine": "tests.support.scripted_scenarios:SlowEngine",
    "rollout__replicas": 2,
    "async_training__staleness_threshold": 3,
    "resources__pin_cores": "false",
    "sync__backend": "auto",
    "checkpoint__every": 2,
    "trainer__steps": 100_000,
    "trainer__optimizer__lr": 1e-6,
    "recovery__max_restarts": 1000,
    "recovery__backoff_s": 0.01,
    "recovery__period_s": 0.1,
    "eval__n": 1,
}
KEEPALIVE = "RAY_grpc_keepalive_timeout_ms"
DAEMONS = {
    KEEPALIVE: before_ray.VARIABLES[KEEPALIVE],  # as launch/ray_host.sh starts Ray
    # The groups of this run have a few KB, which Ray would keep with their metadata in the driver. Those of real runs
    # are on the host that finished them, and so are these.
    "RAY_max_direct_call_object_size": "2000",
}
WORKERS = {"rollout-0", "rollout-1"}
PARTED_S = 30
# What a worker sent before it was stopped has arrived by then.
ON_THE_WAY_S = 1.0
# Ends a test that hangs, and judges no time.
RECOVERED_WITHIN_S = 600.0


class Survivor:
    """The run, its hosts, and where its driver is."""

    def __init__(self, hosts, recipe, folder):
        self.hosts, self._recipe, self.folder = hosts, recipe, folder
        self.driver = hosts[1]
        self.run = self._start()
        self._seen = 0

    def _start(self, **options):
        number = list(self.hosts).index(self.driver)
        return HostRun(self.hosts, self._recipe, self.folder, driver=number, **SETTINGS, **options)

    def resume_on(self, host):
        self.run.close()
        self.driver = host
        self.run = self._start(resume=True)

    def wait_until(self, condition, what):
        self.run.wait_until(condition, what, RECOVERED_WITHIN_S)

    def trains(self, steps=4):
        """Wait until so many more steps are trained."""
        self.run.wait_for_more(steps, RECOVERED_WITHIN_S)

    def forget_events(self):
        self._seen = len(self._log())

    def events(self, *names):
        """Return the log lines of these events since ``forget_events``."""
        return [found for line in self._log()[self._seen :] if (found := json.loads(line))["event"] in names]

    def _log(self):
        whole, _, _ = (self.run.folder / "logs" / "pipeline.jsonl").read_text().rpartition("\n")
        return whole.splitlines()

    def host_of(self, name):
        """Return a host with a process of this name, apart from the driver and, unless asked for, the trainer."""
        apart = [self.driver] if name == "TrainerActor" else [self.driver, *self.run.hosts_of("TrainerActor")]
        found = [host for host in self.run.hosts_of(name) if host not in apart]
        assert found, f"{name} is only on {', '.join(host.name for host in apart)}"
        return found[0]

    def wait_until_busy(self):
        """Wait until each worker has groups in flight and finished ones, which a host that dies takes along."""
        self.wait_until(self._is_busy, "groups in flight and finished ones of each worker")

    def stop_busy(self, host):
        """Stop the workers of a host at a moment when all are busy, so that they still are when the host is killed."""
        self.wait_until(lambda: self._is_busy_when_stopped(host), "groups in flight where workers are stopped")

    def _is_busy_when_stopped(self, host):
        if not self._is_busy():
            return False
        workers = self.run.on(host, "RolloutActor")
        for worker in workers:
            worker.suspend()
        time.sleep(ON_THE_WAY_S)
        if self._is_busy():
            return True
        for worker in workers:
            worker.resume()
        return False

    def _is_busy(self):
        copy = self.folder / "journal-now"
        shutil.copyfile(self.run.folder / "queue.journal", copy)
        with contextlib.closing(FileJournal(copy)) as journal:
            state = rebuilt(load(self.run.folder / "config.yaml"), lambda: journal)
        in_flight = {fields[-1] for fields in state["running"]}
        return in_flight == WORKERS == {fields[-1] for fields, _ in state["queued"]}

    def bring_back(self, host):
        host.boot()
        host.start_ray(self.hosts[0], DAEMONS)

    def end(self):
        """End the run as a user would, and check what it leaves behind."""
        self.run.terminate()
        assert self.run.wait() == 130, self.run.output
        self.run.assert_nothing_left()
        assert "Traceback" not in self.run.output
        check(self.run, self.folder, scripted=True)


@pytest.fixture(scope="module")
def survivor(make_shared_hosts, recipe, tmp_path_factory):
    hosts = make_shared_hosts(4, cpus=CPUS)
    hosts.start_ray(DAEMONS)
    survivor = Survivor(hosts, recipe, tmp_path_factory.mktemp("survivor"))
    try:
        survivor.run.wait_for_step(3)
        yield survivor
        survivor.end()
    finally:
        survivor.run.close()


def test_a_network_that_parts_for_half_a_minute_costs_nothing_but_time(survivor):
    """Between a rollout host and all others. Ray does not take the host for dead, and no process is replaced."""
    apart = survivor.host_of("RolloutActor")
    survivor.wait_until_busy()
    survivor.forget_events()
    apart.link.cut()
    time.sleep(PARTED_S)
    apart.link.heal()
    survivor.trains(6)
    assert len(survivor.run.hosts_of("RolloutActor")) == 2
    assert not survivor.events("process_restarting", "replica_evicted", "payloads_lost", "untracked_group_discarded")


def test_a_rollout_host_dies_with_calls_and_finished_groups(survivor):
    """The prompts of both come again, and another host takes the replica."""
    victim = survivor.host_of("RolloutActor")
    lost = survivor.run.hosts_of("RolloutActor").count(victim)
    survivor.stop_busy(victim)
    survivor.forget_events()
    victim.kill(silently=False)
    survivor.wait_until(lambda: len(survivor.events("worker_restarted")) >= lost, "its replicas have weights")
    assert len(survivor.run.hosts_of("RolloutActor")) == 2
    survivor.wait_until(lambda: survivor.events("payloads_lost"), "finished groups are found lost")
    survivor.trains()
    assert sum(event.get("reissued", 0) for event in survivor.events("process_died")) > 0, "no groups were in flight"
    survivor.bring_back(victim)


def test_the_host_of_the_trainer_dies_and_training_continues_elsewhere(survivor):
    victim = survivor.host_of("TrainerActor")
    survivor.forget_events()
    victim.kill(silently=False)
    survivor.wait_until(lambda: survivor.events("trainer_restarted"), "the trainer is restarted")
    survivor.trains()
    assert victim not in survivor.run.hosts_of("TrainerActor")
    survivor.bring_back(victim)


def test_the_host_of_driver_and_queue_dies_and_the_run_is_restored_on_another(survivor):
    """At once, as a job's scheduler does it: Ray still takes the run that was lost for one that is under way."""
    victim, before = survivor.driver, survivor.run.steps_trained
    assert survivor.run.hosts_of("QueueProcess") == [victim]
    victim.kill()  # silently: no connection is closed, so that Ray finds the loss after a minute
    survivor.run.process.wait(60)
    survivor.resume_on(survivor.hosts[3])
    survivor.wait_until(lambda: survivor.run.steps_trained >= before + 4, "more steps after the resume")
    assert survivor.run.hosts_of("QueueProcess") == [survivor.driver]
    survivor.bring_back(victim)
