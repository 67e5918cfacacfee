"""How the start of Ray fails: every reason is named, and a signal meanwhile interrupts the run."""

import signal

import pytest
import ray

from async_rl.config.loading import validate
from async_rl.driver.cluster import ray_cluster
from async_rl.errors import ResourceError

CONFIG = validate({"model": {"path": "m"}, "data": {"train": "t"}})


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("RAY_ADDRESS", "")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
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

    cluster = start(monkeypatch, init)
    monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), cluster:
        signal.raise_signal(signal.SIGTERM)
    with start(monkeypatch, init):
        monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
