"""Which backend takes weights to the engines, by where the run is."""

import pytest
import ray

from async_rl.config.loading import validate
from async_rl.driver.weight_backend import require_backend, with_backend
from async_rl.errors import ConfigError

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t"}}


@pytest.mark.parametrize(
    ("backend", "address", "environment", "used"),
    [
        ("auto", None, None, "shm"),
        ("auto", "10.0.0.1:6379", None, "object_store"),
        ("auto", None, "10.0.0.1:6379", "object_store"),
        ("shm", None, "10.0.0.1:6379", "shm"),
        ("object_store", None, None, "object_store"),
    ],
)
def test_weights_leave_the_host_only_where_the_run_joins_a_cluster(monkeypatch, backend, address, environment, used):
    monkeypatch.setenv("RAY_ADDRESS", environment or "")
    sections = {"sync": {"backend": backend, "rolling": True}, "cluster": {"address": address}}
    config = validate({**MINIMAL, **sections, "resources": {"device": "cpu"}})
    assert config.sync_backend == used
    # As actors on other hosts see it, and the run folder.
    resolved_config = with_backend(config)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert resolved_config.sync.backend == resolved_config.sync_backend == used


@pytest.mark.parametrize(("backend", "refused"), [("shm", True), ("object_store", False), ("nccl", False)])
def test_shared_memory_is_refused_on_several_hosts(monkeypatch, backend, refused):
    config = validate({**MINIMAL, "sync": {"backend": backend}})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    require_backend(config)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}, {"Alive": True}])
    if not refused:
        require_backend(config)
        return
    with pytest.raises(ConfigError, match=r"sync\.backend is shm.* the cluster has 2 hosts; set sync\.backend to auto"):
        require_backend(config)
