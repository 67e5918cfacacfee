"""How the start of Ray fails: every reason is named, and a signal meanwhile interrupts the run."""

import signal

import pytest
import ray

from async_rl.config.loading import validate
from async_rl.driver.cluster import ray_cluster, require_backend
from async_rl.driver.run import resolved
from async_rl.errors import ConfigError, ResourceError

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t"}}
CONFIG = validate(MINIMAL)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("RAY_ADDRESS", "")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(monkeypatch, init):
    monkeypatch.setattr(ray, "init", lambda **_: init())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return ray_cluster(CONFIG)


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
    resolved_config = resolved(config, resume=True)
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


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), ValueError("no memory")])
def test_whatever_ray_raises_is_named(monkeypatch, error):
    def init():
        raise error

    with pytest.raises(ResourceError, match=f"Ray did not start: {error}.*logs"), start(monkeypatch, init):
        pass


def test_sigterm_while_ray_starts_interrupts_the_run_once(monkeypatch):
    def init():
        signal.signal(signal.SIGTERM, lambda number, _: exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), start(monkeypatch, init):
        pass
    signal.raise_signal(signal.SIGTERM)  # the run ends already


def test_sigterm_after_ray_has_started_interrupts_the_run_and_not_its_end(monkeypatch):
    def init():
        signal.signal(signal.SIGTERM, lambda number, _: exit(number))

    cluster = start(monkeypatch, init)
    monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), cluster:
        signal.raise_signal(signal.SIGTERM)
    with start(monkeypatch, init):
        monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
