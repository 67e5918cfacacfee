"""What the driver does before and after it asks the hosts of a cluster; tests/integration asks them."""

from types import SimpleNamespace

import pytest
import ray

from async_rl.config.loading import validate
from async_rl.doctor.host_report import HostReport
from async_rl.driver import hosts
from async_rl.driver.cluster import ray_exporters
from async_rl.driver.hosts import Survey
from async_rl.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config(**sections):
    return validate({"model": {"path": "/m"}, "data": {"train": "/t"}, **sections})


def survey(*gpus_at: tuple[str, int]) -> Survey:
    reports = [HostReport(address, address, f"node{n}", gpus=gpus) for n, (address, gpus) in enumerate(gpus_at)]
    return Survey(reports, reports[0])


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    return lambda found, **sections: hosts.settled(config(cluster={"address": "auto"}, **sections), found)


def test_the_hosts_decide_device_and_where_metrics_are_served(settled):
    several = survey(("10.0.0.1", 0), ("10.0.0.2", 8))
    made = settled(several)
    # Processes on hosts without RAY_ADDRESS, and where "auto" is another cluster, need the address.
    assert (made.resources.device, made.cluster.address, made.metrics.host) == ("cuda", "10.0.0.1:6379", None)
    one = settled(survey(("10.0.0.1", 0), ("10.0.0.1", 0)))
    assert (one.resources.device, one.metrics.host) == ("cpu", "127.0.0.1")
    explicit = settled(several, resources={"device": "cpu"}, metrics={"host": "0.0.0.0"})
    assert (explicit.resources.device, explicit.metrics.host) == ("cpu", "0.0.0.0")


def test_the_host_that_has_the_run_folder_is_the_driver_s_where_none_is_shared(settled):
    several, one = survey(("10.0.0.1", 0), ("10.0.0.2", 8)), survey(("10.0.0.1", 0), ("10.0.0.1", 0))
    assert settled(several, name="x").cluster.run_host is None
    own = Survey(several.hosts, several.hosts[1])
    earlier = {"address": "auto", "run_host": "10.0.0.9"}  # of a config.yaml that is used again
    made = hosts.settled(config(cluster=earlier | {"shared_fs": False}), own)
    assert made.cluster.run_host == "10.0.0.2"
    assert hosts.settled(config(cluster=earlier | {"shared_fs": False}), one).cluster.run_host is None
    assert hosts.settled(config(cluster=earlier), several).cluster.run_host is None


def test_a_run_that_joins_no_cluster_asks_no_host():
    given = config()
    with hosts.joined(given) as unchanged:
        assert unchanged is given
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match=r"^--cluster: no cluster is named; set cluster\.address"):
        hosts.examine(given)


def test_the_answer_of_another_release_is_read_as_far_as_it_goes():
    known = {"name": "10.0.0.2", "address": "10.0.0.2", "node_id": "node2", "gpus": 8, "free_gpus": 3}
    report = hosts.report_of(known, {"code": "0.2.0 (0)", "of_a_later_release": 1})
    assert (report.code, report.cores, report.free_gpus, report.fault) == ("0.2.0 (0)", 0, 3, "")
    assert hosts.report_of(known, "no answer within 60 s").fault == "no answer within 60 s"


def test_why_a_host_has_no_report_is_one_line():
    imported = RuntimeError(
        "The remote function failed to import:\n\nTraceback:\n  x\nModuleNotFoundError: No module a\n"
    )
    assert hosts._in_one_line(imported) == "RuntimeError: ModuleNotFoundError: No module a"
    assert hosts._in_one_line(ValueError()) == "ValueError: without a message"


def test_the_file_that_every_host_looks_for_is_removed(tmp_path):
    runs = tmp_path / "a" / "runs"
    with hosts._token(runs) as token:
        assert token.read_text() == token.name
    assert list(tmp_path.iterdir()) == []
    (runs / "run").mkdir(parents=True)
    with hosts._token(runs):
        pass
    assert list(runs.iterdir()) == [runs / "run"]
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"^runs: cannot write to .*set --runs"),
        hosts._token(tmp_path / "file" / "b"),
    ):
        pass


def test_paths_that_no_process_reads_are_not_compared():
    assert not hosts._is_compared(config(), "runs")
    assert not hosts._is_compared(config(), "cluster.local_dir"), "each host has its own"
    assert not hosts._is_compared(config(), "queue.redis.password_file")
    assert hosts._is_compared(config(queue={"backend": "redis"}), "queue.redis.password_file")
    assert hosts._is_compared(config(), "model.path")


def test_ray_s_own_metrics_are_announced_where_each_node_serves_them(monkeypatch):
    nodes = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080},
        {"Alive": True, "NodeManagerAddress": "fd00::2", "MetricsExportPort": 8081},
        {"Alive": True, "NodeManagerAddress": "10.0.0.3", "MetricsExportPort": -1},
        {"Alive": False, "NodeManagerAddress": "10.0.0.4", "MetricsExportPort": 8082},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert ray_exporters() == ["10.0.0.1:8080", "[fd00::2]:8081"]
