"""How the start of Ray fails: every reason is named, and a signal meanwhile interrupts the run."""

import os
import signal

import pytest
import ray
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config

from async_rl.config.loading import validate
from async_rl.driver import local_ray
from async_rl.driver.cluster import ray_cluster
from async_rl.errors import ResourceError

CONFIG = validate({"model": {"path": "m"}, "data": {"train": "t"}})


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("RAY_ADDRESS", "")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    yield
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def token() -> str:
    """The token that this process sends to Ray."""
    return AuthenticationTokenLoader.instance().get_raw_token()


def test_a_cluster_of_one_host_is_on_loopback_and_asks_for_a_token_of_its_own(monkeypatch):
    seen = {}

    def init(**arguments):
        seen.update(arguments, token=token(), address=services.resolve_ip_for_localhost(arguments["_node_ip_address"]))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    # What a user has opted out of for other clusters does not open this one.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A host on a network; what Ray makes of 127.0.0.1 there is why it is patched.
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.1")
    assert services.resolve_ip_for_localhost("127.0.0.1") == "192.0.2.1", "local_ray.loopback is no longer needed"
    with ray_cluster(CONFIG):
        assert os.environ["RAY_AUTH_MODE"] == "token"  # for Ray's processes
    assert seen["address"] == "127.0.0.1"
    assert len(seen["token"]) == 64
    assert os.environ["RAY_AUTH_TOKEN"] == seen["token"]
    assert services.resolve_ip_for_localhost("127.0.0.1") == "192.0.2.1", "the patch ends with the start"


def test_a_token_that_the_user_has_set_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda **_: None)
    (tmp_path / "token").write_text("b" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    local_ray.start()
    assert token() == "b" * 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    local_ray.start()
    assert token() == "a" * 64


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
