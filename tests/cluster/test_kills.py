"""Hosts that die while a run uses them, and a network that parts for a while; the invariants hold afterwards."""

import time

import pytest

from tests.cluster.test_ports import SCRIPTED
from tests.support.invariants import check

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.long]

SETTINGS = {
    "rollout__engine": SCRIPTED,
    "rollout__replicas": 2,
    "resources__pin_cores": "false",
    "sync__backend": "auto",
    "checkpoint__every": 2,
    "trainer__steps": 100_000,
    "trainer__optimizer__lr": 1e-6,
    "recovery__max_restarts": 1000,
    "recovery__backoff_s": 0.01,
    "recovery__period_s": 0.1,
    "sync__timeout_s": 20,
    "eval__n": 1,
}
# The head and the driver are apart from what is killed, except where the driver is killed. A core for each rollout
# worker and for the trainer, each on a host of its own.
CPUS = (0, 1, 1, 1)
RECOVERED_WITHIN_S = 240.0
READY = "tests.support.scripted_scenarios:InstantEngine"


@pytest.fixture
def hosts(make_hosts):
    hosts = make_hosts(4, cpus=CPUS)
    hosts.start_ray()
    return hosts


def host_of(run, name):
    """Return the host of the first process of this name."""
    return run.hosts_of(name)[0]


def ended(run) -> None:
    """End the run as a user would."""
    run.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    assert "Traceback" not in run.output


def test_a_rollout_host_dies_with_running_calls_and_its_replacement_takes_its_place(hosts, run_on, tmp_path):
    run = run_on(hosts, **SETTINGS)
    run.wait_for_step(4)
    victim = host_of(run, "RolloutActor")
    assert victim not in run.hosts_of("TrainerActor")
    victim.kill()
    run.wait_for_more(4, RECOVERED_WITHIN_S)
    assert len(run.hosts_of("RolloutActor")) == 1, "the run goes on with the other one"
    victim.boot()
    victim.start_ray(hosts[0])
    run.wait_until(lambda: len(run.hosts_of("RolloutActor")) == 2, "the replica is on the new host", RECOVERED_WITHIN_S)
    run.wait_for_more(4, RECOVERED_WITHIN_S)
    ended(run)
    check(run, tmp_path, scripted=True)


def test_a_host_dies_with_finished_groups_and_their_prompts_come_again(hosts, run_on, tmp_path):
    # The queue is always full of groups, because an engine has them at once and the trainer does not.
    run = run_on(hosts, **SETTINGS | {"rollout__engine": READY, "async_training__staleness_threshold": 3})
    run.wait_for_step(4)
    host_of(run, "RolloutActor").kill()
    run.wait_for_more(4, RECOVERED_WITHIN_S)
    ended(run)
    check(run, tmp_path, scripted=True)
    assert run.summary["groups"]["dropped"] > 0
    assert "payload_lost" in (run.folder / "logs" / "pipeline.jsonl").read_text()


def test_the_host_of_a_trainer_rank_dies_and_training_continues_elsewhere(make_hosts, run_on, tmp_path):
    hosts = make_hosts(4, cpus=(0, 2, 2, 2))
    hosts.start_ray()
    run = run_on(hosts, **SETTINGS)
    run.wait_for_step(5)
    victim = host_of(run, "TrainerActor")
    victim.kill()
    run.wait_for_more(4, RECOVERED_WITHIN_S)
    assert victim not in run.hosts_of("TrainerActor")
    ended(run)
    check(run, tmp_path, scripted=True)


def test_the_host_of_driver_and_queue_dies_and_the_run_resumes_on_another(hosts, run_on, tmp_path):
    run = run_on(hosts, driver=1, **SETTINGS)
    run.wait_for_step(5)
    steps = run.steps_trained
    hosts[1].kill()
    run.process.wait(60)
    hosts[1].boot()
    hosts[1].start_ray(hosts[0])
    run = run_on(hosts, driver=2, resume=True, **SETTINGS)
    run.wait_until(lambda: run.steps_trained >= steps + 4, "more steps after the resume", RECOVERED_WITHIN_S)
    ended(run)
    check(run, tmp_path, scripted=True)


@pytest.mark.parametrize("name", ["RolloutActor", "TrainerActor"])
def test_nothing_is_lost_or_doubled_by_a_network_that_parts_for_half_a_minute(hosts, run_on, tmp_path, name):
    run = run_on(hosts, **SETTINGS | {"sync__timeout_s": 120})
    run.wait_for_step(4)
    apart = host_of(run, name)
    apart.link.cut()
    time.sleep(30)
    apart.link.heal()
    run.wait_for_more(6, RECOVERED_WITHIN_S)
    ended(run)
    check(run, tmp_path, scripted=True)
