"""A real engine whose two tensor-parallel ranks are on two hosts: pushes, a part that is killed, and what is left."""

import json

import pytest

from tests.cluster.runs import summary_is_whole
from tests.cluster.test_ports import check_host

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.slow]

SETTINGS = {
    "rollout__tensor_parallel_size": 2,
    "rollout__hosts_per_engine": 2,
    "resources__pin_cores": "false",
    "sync__backend": "auto",
    "eval__n": 1,
}


def test_an_engine_over_two_hosts_takes_every_push_and_is_replaced_when_its_part_is_killed(make_hosts, run_on):
    # Room for a part on each host, and beside it for the trainer on the second.
    hosts = make_hosts(2, cpus=(1, 2))
    hosts.start_ray()
    run = run_on(hosts, trainer__steps=8, recovery__backoff_s=0.01, **SETTINGS)
    run.wait_for_step(2)
    (worker,), (part,) = run.hosts_of("RolloutActor"), run.hosts_of("EnginePart")
    assert {worker.name, part.name} == {"host-1", "host-2"}
    for host in (worker, part):
        assert len(host.processes("VLLM::Worker")) == 1, "a rank on each"
    assert len(worker.processes("VLLM::EngineCore")) == 1
    assert not part.processes("VLLM::EngineCore")
    for host in hosts:
        assert "EngineCore" in check_host(host, joined=True, spanning=True)
    run.one("EnginePart").kill()
    assert run.wait() == 0, run.output
    (ended,) = _logged(run, "rollout-0", "engine_part_ended")
    assert ended["part"] == 1
    (died,) = _logged(run, "pipeline", "process_restarting")
    assert died["process"] == "rollout-0"
    summary_is_whole(run)
    run.assert_nothing_left()


def _logged(run, role, event):
    lines = (run.folder / "logs" / f"{role}.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]
