"""A run over two hosts of which only the driver's has the run folder (cluster.shared_fs false), and its resumption.

The second host has an empty file system in the place of the folder of the runs: what a process there wrote into the run
folder would stay in it. On it are one of two trainer ranks and the engine.
"""

import json

import pytest

from async_rl.runtime import manifest
from tests.cluster.runs import summary_is_whole
from tests.cluster.test_ports import check_host
from tests.support.real_run import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = SCRIPTED | {
    "resources__engine_threads": 2,  # so that the engine finds room on the second host alone, beside one rank
    "resources__pin_cores": "false",
    "trainer__parallel__tp": 2,
    "cluster__shared_fs": "false",
    "checkpoint__every": 2,
    "eval__n": 1,
}


def lines(run, name):
    return (run.folder / name).read_text().splitlines()


def test_a_run_whose_folder_is_on_one_host_writes_checkpoints_there_and_resumes_from_them(make_hosts, run_on, tmp_path):
    hosts = make_hosts(2, cpus=(1, 3))
    runs = tmp_path / "runs"
    runs.mkdir()
    hosts[1].run(["mount", "-t", "tmpfs", "runs", str(runs)])
    hosts.start_ray()
    run = run_on(hosts, trainer__steps=4, **SETTINGS)
    run.wait_for_step(2)
    assert sorted(host.name for host in run.hosts_of("TrainerActor")) == ["host-1", "host-2"]
    assert [host.name for host in run.hosts_of("RolloutActor")] == ["host-2"]
    seen = [check_host(host, joined=True) for host in hosts]
    assert "CourierProcess" in seen[0] - seen[1]
    assert "HostFiles" in seen[1] - seen[0]
    # Each process is announced at its own host's address, where the driver's host reaches it.
    run.wait_until((run.folder / "prometheus" / "targets" / "rollout.json").exists, "the target of another host")
    targets = {path.stem: json.loads(path.read_text())[0] for path in (run.folder / "prometheus/targets").iterdir()}
    served = {name: target["targets"][0].rpartition(":")[0] for name, target in targets.items()}
    assert {served["pipeline"], *(served[name] for name in served if name.startswith("trainer"))} >= {
        host.address for host in hosts
    }
    assert served["rollout"] == hosts[1].address
    fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())"
    for name, metric in (("pipeline", "async_rl_policy_version"), ("rollout", "async_rl_generated_tokens_total")):
        assert metric in hosts[0].python(fetch, f"http://{targets[name]['targets'][0]}/metrics")
    assert run.wait() == 0, run.output
    summary_is_whole(run)

    checkpoint = run.folder / "checkpoints" / "step-000004"
    entries = manifest.read(checkpoint)
    assert {name.split("_")[2] for name in entries if name.endswith(".distcp")} == {"0", "1"}, "of both ranks"
    assert manifest.find_altered(checkpoint, entries) is None
    assert list((run.folder / "checkpoints" / "final").glob("*.safetensors"))
    logs = {name: lines(run, f"logs/{name}.jsonl") for name in ("rollout-0", "trainer-0", "trainer-1")}
    for name, log in logs.items():
        assert {json.loads(line)["role"] for line in log} == {name}
        assert len(set(log)) == len(log), "no line comes twice"
    assert {json.loads(line)["what"] for line in lines(run, "timeline/rollout-0.jsonl")} >= {"call", "pause"}
    assert list((run.folder / "prometheus" / "targets").iterdir()) == []
    assert list((runs / ".prometheus").iterdir()) == []
    assert_nothing_elsewhere(hosts, runs)

    resumed = run_on(hosts, resume=True, trainer__steps=6, **SETTINGS)
    assert resumed.wait() == 0, resumed.output
    (restored,) = resumed.events("work_restored")
    assert restored["step"] == 4
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6]
    for name, log in logs.items():
        found = lines(resumed, f"logs/{name}.jsonl")
        assert found[: len(log)] == log
        assert len(set(found)) == len(found) > len(log), "the log continues"
    assert not resumed.events("checkpoint_damaged")
    assert_nothing_elsewhere(hosts, runs)
    resumed.assert_nothing_left()


def assert_nothing_elsewhere(hosts, runs):
    """The second host never had anything where the run folder is, and its spool is gone."""
    assert hosts[1].run(["ls", "-A", str(runs)]) == ""
    assert [path.name for path in (hosts[1].folder / "tmp").glob("async_rl-*/*")] == []
