"""How Ray starts or is joined, and fails to: every reason is named, and a signal meanwhile interrupts the run."""

import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError

from async_rl.config.loading import validate
from async_rl.driver import cluster
from async_rl.driver.cluster import ray_cluster
from async_rl.errors import ConfigError, ResourceError

CONFIG = validate({"model": {"path": "m"}, "data": {"train": "t"}})
JOINS = validate({"model": {"path": "m"}, "data": {"train": "t"}, "cluster": {"address": "10.0.0.1:6379"}})


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("RAY_ADDRESS", "")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(monkeypatch, init):
    monkeypatch.setattr(ray, "init", lambda **_: init())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return ray_cluster(CONFIG)


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

    started = start(monkeypatch, init)
    monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), started:
        signal.raise_signal(signal.SIGTERM)
    with start(monkeypatch, init):
        monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))


@pytest.fixture
def joined(monkeypatch):
    """Return the arguments with which a run that joins a cluster connects."""
    arguments = {}
    monkeypatch.setattr(ray, "init", arguments.update)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "_reach", lambda _: None)
    monkeypatch.setattr(cluster, "_hold_name", lambda *_: None)

    def join(config=JOINS):
        arguments.clear()
        with ray_cluster(config):
            return arguments

    return join


def test_a_run_joins_the_cluster_of_its_settings_or_else_of_the_environment(monkeypatch, joined):
    assert joined()["address"] == "10.0.0.1:6379"
    assert joined(CONFIG)["address"] == "local", "not one that was started on this host by chance"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert joined()["address"] == "10.0.0.1:6379"
    assert joined(CONFIG)["address"] == "10.0.0.2:6379"


def test_processes_of_a_joined_cluster_get_the_environment_that_they_cannot_inherit(monkeypatch, joined):
    assert joined()["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == os.environ["HF_HUB_OFFLINE"] == "1"
    assert "runtime_env" not in joined(CONFIG)
    job = {"runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "0"}}}  # ``ray job submit`` lets no name be set twice
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    left = joined()["runtime_env"]["env_vars"]
    assert "HF_HUB_OFFLINE" not in left
    assert "DO_NOT_TRACK" in left


class Name:
    """What Ray has of a name on the cluster: free once ``frees_s`` have passed, of a run that responds or not."""

    def __init__(self, monkeypatch, frees_s, responds):
        self.now, self._frees_s, self._responds = 0.0, frees_s, responds
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
        monkeypatch.setattr(ray, "remote", lambda _: self)
        monkeypatch.setattr(ray, "get_actor", lambda _: self)
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def options(self, **_):
        return self

    def remote(self):
        if self.now < self._frees_s:
            raise ValueError("The name run is already taken")
        return SimpleNamespace(is_mine=self)

    is_mine = property(lambda self: SimpleNamespace(remote=lambda: "other"))

    def _get(self, call, timeout=None):
        if call == "other" and not self._responds:
            self._sleep(timeout)
            raise GetTimeoutError
        return True

    def _sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(("frees_s", "responds"), [(0, True), (9, True), (70, False)])
def test_the_name_of_a_run_that_ended_or_was_lost_with_its_host_is_waited_for(monkeypatch, frees_s, responds):
    name = Name(monkeypatch, frees_s, responds)
    cluster._hold_name("run", "10.0.0.1:6379")
    assert frees_s <= name.now < frees_s + 6


@pytest.mark.parametrize(("responds", "within_s"), [(True, 11), (False, 130)])
def test_the_name_of_a_run_that_stays_is_refused(monkeypatch, responds, within_s):
    name = Name(monkeypatch, 10_000, responds)
    with pytest.raises(ConfigError, match=r"a run named run is under way on the Ray cluster at 10\.0\.0\.1:6379; give"):
        cluster._hold_name("run", "10.0.0.1:6379")
    assert name.now < within_s


def at(address):
    return JOINS.model_copy(update={"cluster": JOINS.cluster.model_copy(update={"address": address})})


def test_an_address_of_ray_client_is_refused(joined):
    with pytest.raises(ConfigError, match=r"cluster\.address ray://head:10001 is not host:port"):
        joined(at("ray://head:10001"))


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.2:{closed}"])
def test_an_address_at_which_nothing_listens_is_one_line_at_once(address):
    began = time.monotonic()
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", 0))
        address = address.format(closed=closed.getsockname()[1])
        said = pytest.raises(ResourceError, match=rf"the Ray cluster at {address} cannot be joined: .*; ")
        with said as error, ray_cluster(at(address)):
            pass
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 30, "Ray itself tries for minutes"


def test_why_ray_did_not_connect_is_one_line_with_what_to_do():
    token = ConnectionError("Failed to connect")
    token.__cause__ = RuntimeError("InvalidAuthToken: the authentication\n token is wrong. Ensure that\n it is there")
    said = cluster.why_not_joined(token)
    assert said.startswith("InvalidAuthToken: the authentication token is wrong; set RAY_AUTH_MODE=token, and")
    assert "cluster's version of Ray" in cluster.why_not_joined(RuntimeError("Version mismatch:\n Ray: 2.0"))
