"""A cluster that a run starts is on loopback alone, and asks for a token."""

import os

import pytest
import ray
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config

from async_rl.driver import local_ray


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    yield
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def token() -> str:
    """Return the token that this process sends to Ray."""
    return AuthenticationTokenLoader.instance().get_raw_token()


def test_a_cluster_of_one_host_is_on_loopback_and_asks_for_a_token_of_its_own(monkeypatch):
    seen = {}

    def init(**arguments):
        seen.update(arguments, token=token(), address=services.resolve_ip_for_localhost(arguments["_node_ip_address"]))

    monkeypatch.setattr(ray, "init", init)
    # What a user has opted out of for other clusters does not open this one.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A host on a network; what Ray makes of 127.0.0.1 there is why it is patched.
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.1")
    assert services.resolve_ip_for_localhost("127.0.0.1") == "192.0.2.1", "local_ray.loopback is no longer needed"
    local_ray.start(num_cpus=2)
    assert seen["num_cpus"] == 2
    assert seen["address"] == "127.0.0.1"
    assert len(seen["token"]) == 64
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", seen["token"]), (
        "for Ray's processes"
    )
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
