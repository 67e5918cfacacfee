"""One run over two hosts, with a scripted engine on each: the whole way of weights and groups between hosts."""

import pytest

from tests.cluster.runs import summary_is_whole
from tests.cluster.test_ports import check_host
from tests.support.real_run import SCRIPTED

pytestmark = pytest.mark.e2e


def test_a_run_over_two_hosts_trains_verifies_every_push_and_opens_the_documented_ports_alone(make_hosts, run_on):
    # Room for the trainer on the second host alone, and beside it for one engine, so that the other is on the first.
    hosts = make_hosts(2, cpus=(1, 3))
    hosts.start_ray()
    run = run_on(
        hosts,
        rollout__replicas=2,
        resources__trainer_threads=2,
        resources__pin_cores="false",
        sync__backend="auto",
        trainer__steps=3,
        eval__n=1,
        **SCRIPTED,
    )
    run.wait_for_step(1)
    assert sorted(host.name for host in run.hosts_of("RolloutActor")) == ["host-1", "host-2"]
    assert [host.name for host in run.hosts_of("TrainerActor")] == ["host-2"]
    assert [host.name for host in run.hosts_of("QueueProcess")] == ["host-1"], "the queue is beside the driver"
    seen = [check_host(host, joined=True) for host in hosts]
    assert run.wait() == 0, run.output
    assert "gcs_server" in seen[0] - seen[1]
    summary = summary_is_whole(run)
    assert summary["groups"]["trained"] == 12
    run.assert_nothing_left()
