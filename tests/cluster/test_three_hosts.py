"""The real stack over three hosts: trainer ranks on two, an engine on each of these, the queue on the third."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cluster.runs import summary_is_whole
from tests.cluster.test_ports import SCRIPTED, check_host

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Ray counts cores that are not there. Two ranks of two threads do not fit on a host beside each other, and an engine of
# one thread fits beside a rank. The first host has the driver and with it the queue, and no core for anything else.
CPUS = (0, 3, 3)
LAYOUT = {
    "trainer__parallel__tp": 2,
    "rollout__replicas": 2,
    "resources__trainer_threads": 2,
    "resources__pin_cores": "false",
    "sync__backend": "auto",
}
APART = ["host-2", "host-3"]


def names(hosts) -> list[str]:
    return sorted(host.name for host in hosts)


@pytest.mark.long
def test_real_engines_and_a_trainer_split_over_two_hosts_agree_at_every_push(make_hosts, run_on):
    hosts = make_hosts(3, cpus=CPUS)
    hosts.start_ray()
    run = run_on(hosts, trainer__steps=12, **LAYOUT)
    run.wait_for_step(1)
    assert names(run.hosts_of("TrainerActor")) == names(run.hosts_of("EngineCore")) == APART
    assert names(run.hosts_of("QueueProcess")) == ["host-1"]
    seen = {port for host in hosts for port in check_host(host, joined=True)}
    assert {"TrainerActor", "EngineCore", "RolloutActor"} <= seen
    assert run.wait() == 0, run.output
    summary = summary_is_whole(run)  # the canary passed at each push
    assert summary["trajectories"]["partial"] > 0
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 1e-5
    assert summary["token_staleness"]["max"] <= 3
    first, last = (np.mean([row["reward_mean"] for row in part]) for part in (run.rows[:4], run.rows[-4:]))
    assert last > first - 0.1, "it must not unlearn; twelve steps are too few to learn from random weights"
    run.assert_nothing_left()


def test_three_hosts_train_the_groups_of_one_bit_for_bit(make_hosts, run_on, start_run, tmp_path):
    """Synchronous and scripted: the same prompts, tokens, log-probs, versions and routed experts in each step."""
    settings = LAYOUT | {
        "rollout__engine": SCRIPTED,
        "async_training__partial_rollout__mode": "drain",
        "async_training__staleness_threshold": 0,
        "async_training__max_staleness": 0,
        "debug__dump_trajectories": 64,
        "trainer__steps": 4,
        "eval__n": 1,
    }
    one = start_run(**settings)
    assert one.wait() == 0, one.output
    hosts = make_hosts(3, cpus=CPUS)
    hosts.start_ray()
    three = run_on(hosts, folder=tmp_path / "three", **settings)
    assert three.wait() == 0, three.output
    summary_is_whole(three)
    assert [sorted(row["groups"]) for row in three.trained] == [sorted(row["groups"]) for row in one.trained]
    dumped = [
        {path.name: path.read_bytes() for path in (run.folder / "trajectories").iterdir()} for run in (one, three)
    ]
    assert len(dumped[0]) == 16
    assert dumped[0] == dumped[1]
    # What the trainer makes of them is the same up to the order in which a step's groups came.
    models = [load_file(next((run.folder / "checkpoints" / "final").glob("*.safetensors"))) for run in (one, three)]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        np.testing.assert_allclose(models[1][name], weight, atol=2e-4, err_msg=name)
