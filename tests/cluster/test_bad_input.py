"""What hosts differ in is said in one line before anything of a run starts: here what only real hosts can differ in.

Versions, modules and GPUs of hosts: tests/integration/test_cluster_doctor.py.
"""

import shutil

import pytest

from tests.cluster.hosts import INSIDE
from tests.support.real_run import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = {**SCRIPTED, "trainer__steps": 10_000, "eval__n": 1}


@pytest.fixture(scope="module")
def hosts(make_shared_hosts):
    hosts = make_shared_hosts(2)
    hosts.start_ray()
    return hosts


def refused(run, code: int = 2) -> str:
    """Return the line with which the run has ended before anything of it was started."""
    assert run.wait() == code, run.output
    assert "Traceback" not in run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("async-rl: ")]
    assert not run.folder.exists()
    run.assert_nothing_left()
    return line


def test_a_wrong_token_is_refused(hosts, run_on, tmp_path):
    (tmp_path / "wrong").write_text("f" * 64)
    line = refused(run_on(hosts, env={"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, **SETTINGS), code=1)
    assert line.startswith(f"async-rl: the Ray cluster at {hosts.address} cannot be joined: ")
    assert line.endswith("; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token")


def test_a_model_that_only_the_driver_s_host_has_is_named_with_the_host_that_lacks_it(hosts, run_on, tiny_model):
    shutil.copytree(tiny_model, hosts[0].folder / "work" / "model")
    line = refused(run_on(hosts, model__path=INSIDE / "work" / "model", **SETTINGS))
    assert line.startswith(
        f"async-rl: model.path: the path exists where the driver is, but is not on {hosts[1].address}"
    )


def test_a_folder_of_runs_that_hosts_do_not_share_is_named(hosts, run_on):
    """The same path on each host, and a folder of its own there."""
    runs = INSIDE / "work" / "runs"
    line = refused(run_on(hosts, runs=runs, **SETTINGS))
    assert line.startswith(f"async-rl: runs: {runs} must be one folder for all hosts, but ")
    assert hosts[1].address in line


def test_an_interface_that_one_host_lacks_is_named(hosts, run_on):
    hosts[0].run(["ip", "link", "add", "name", "fast0", "type", "veth", "peer", "name", "fast1"])
    hosts[0].run(["ip", "addr", "add", "10.99.0.1/24", "dev", "fast0"])
    line = refused(run_on(hosts, cluster__interface="fast0", **SETTINGS))
    assert line.startswith("async-rl: cluster.interface: fast0 is no interface with an address on every host: ")
    assert f"{hosts[1].address} has " in line
    assert f"{hosts[0].address} has " not in line
